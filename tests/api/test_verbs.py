"""The verbs as functions: their arguments and documentation are those of the declared options."""

from __future__ import annotations

import ast
import doctest
import inspect
import re
from collections.abc import Iterator
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest

import robustkit
from robustkit.api.options import craft, evaluate, runs, train
from robustkit.api.options.declare import EXPECTED, Options, described
from robustkit.api.options.shared import SearchOptions
from robustkit.cli import run
from robustkit.crafting.matrix import MatrixRequest
from robustkit.crafting.spec import CraftRequest
from robustkit.diagnostics.ensemble_diversity import DiversityRequest
from robustkit.engine.evaluation.run import Evaluation
from robustkit.engine.planning.cost_probe import CostProbe
from robustkit.registry import DEFAULT_SUITE
from robustkit.training.train import Training

VERBS = ("attack", "corrupt", "craft", "diversity", "evaluate", "minimum_norm", "plan", "train", "verify")
CLASSES = {
    found
    for module in (craft, evaluate, runs, train)
    for found in vars(module).values()
    if isinstance(found, type) and issubclass(found, Options)
}


@pytest.mark.parametrize("name", VERBS)
def test_every_argument_is_documented_and_the_example_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    function = getattr(robustkit, name)
    text = inspect.getdoc(function) or ""
    for argument in inspect.signature(function).parameters:
        assert f"\n    {argument}: " in text
    assert text.index("Args:") < text.index("Returns:") < text.index("Raises:") < text.index("Example:")
    (example,) = doctest.DocTestFinder(recurse=False).find(function, name, globs={})
    assert len(example.examples) >= 3
    assert doctest.DocTestRunner().run(example).failed == 0


@pytest.mark.parametrize("options", sorted(CLASSES, key=repr), ids=lambda options: options.__name__)
def test_every_option_can_be_read_from_a_command_line(options: type[Options]) -> None:
    """Its type is one that texts are read for, or it says how."""
    for field in fields(options):
        about = described(field)
        assert about.help.endswith((".", "…", "MODEL_FORM", "]"))
        kind = str(field.type).removesuffix(" | None").removesuffix(" | torch.device").removesuffix(" | float")
        if options.__name__.endswith("Flags"):
            assert kind in (*EXPECTED, "Sequence[str]", "Sequence[Path]") or about.read


@pytest.mark.parametrize(
    ("options", "request_class"),
    [
        (evaluate.EvaluateOptions, Evaluation),
        (evaluate.PlanOptions, CostProbe),
        (craft.CraftOptions, CraftRequest),
        (craft.MatrixFlags, MatrixRequest),
        (craft.DiversityOptions, DiversityRequest),
        (train.TrainOptions, Training),
    ],
)
def test_options_have_the_types_of_the_request_that_they_are_passed_to(
    options: type[Options], request_class: type
) -> None:
    types = {field.name: str(field.type).removeprefix("registry.") for field in fields(request_class)}
    shared = {field.name: field.type for field in fields(options) if field.name in types}
    assert len(shared) >= 4
    for name in shared.keys() - {"device", "strictness", "threat"}:
        assert shared[name] == types[name]


PACKAGE = Path(robustkit.__file__).parent
# Files that read the flags of a verb beside its own.
FURTHER = {"evaluate": ("leaderboard",), "doctor": ("factsheet",), "list": ("listing",)}


def attributes_read(files: list[Path], *variables: str) -> Iterator[str]:
    """Yield the attributes that code reads; of these variables, or of anything if none is given."""
    for node in (node for file in files if file.exists() for node in ast.walk(ast.parse(file.read_text()))):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            if not variables or (isinstance(node.value, ast.Name) and node.value.id in variables):
                yield node.attr


@pytest.mark.parametrize(
    "options",
    sorted((one for one in CLASSES if re.search("(?<!Image)(Arguments|Flags)$", one.__name__)), key=repr),
    ids=lambda options: options.__name__,
)
def test_every_option_is_read(options: type[Options]) -> None:
    """By its verb's code; or by the engine, from the field of the same name of the request that is passed on."""
    verb = re.sub("(?<=[a-z])(?=[A-Z])", "_", re.sub("(Arguments|Flags)$", "", options.__name__)).lower()
    files = [PACKAGE / "api" / f"{verb}.py", PACKAGE / "api" / "inputs.py"]
    if options.__name__.endswith("Flags"):
        files += [PACKAGE / "cli" / "verbs" / f"{name}.py" for name in (verb, *FURTHER.get(verb, ()))]
        files.append(PACKAGE / "cli" / "inputs.py")
    unread = {field.name for field in fields(options)} - {*attributes_read(files, "arguments", "flags", "options")}
    text = re.sub(r"\s", "", "".join(file.read_text() for file in files if file.exists()))
    for request in (Evaluation, CostProbe, CraftRequest, MatrixRequest, DiversityRequest, Training):
        if f"build({request.__name__}," in text:
            rooms = {Path(inspect.getfile(base)).parent for base in request.__mro__[:-1]}
            engine = attributes_read([file for room in rooms for file in room.glob("*.py")])
            unread -= {field.name for field in fields(request)} & {*engine}
    assert unread == set()


def test_a_wrong_value_gets_the_same_sentence_from_python_and_from_the_command_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value, sentence in (
        ("audit", -1, "must be at least 0, got -1."),
        ("workers", 0, "must be from 1 to 1024, got 0."),
        ("stop_at_width", 1.5, "must be above 0 and below 1, got 1.5."),
        ("time_limit", float("nan"), "must be a finite number, got nan."),
    ):
        with pytest.raises(robustkit.UsageError) as error:
            robustkit.evaluate(lambda x: x, [], threat="linf:0.1", **{name: value})  # type: ignore[arg-type]
        assert str(error.value) == f"{name} {sentence}"
        flag = f"--{name.replace('_', '-')}"
        assert run(["evaluate", flag, str(value)]) == 2
        assert capsys.readouterr().err == f"error: {flag} {sentence}\n"


def test_the_default_suite_is_that_of_the_registry() -> None:
    assert {SearchOptions.suite, evaluate.MinimumNormArguments.attack} == {DEFAULT_SUITE}


def test_dir_shows_the_public_names_and_no_others() -> None:
    import_module("robustkit.engine")
    assert dir(robustkit) == sorted(robustkit.__all__)
    assert all(getattr(robustkit, name) for name in dir(robustkit))
