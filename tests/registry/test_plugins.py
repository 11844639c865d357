"""Attacks, defenses, methods, models and data of other packages and files, and the page about them."""

from __future__ import annotations

import json
import pickle
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import robustkit
from robustkit import UsageError, registry
from robustkit.cli import run
from robustkit.engine.evaluation.leaderboard import settings_id
from robustkit.models.allowed_paths import recorded_model
from robustkit.registry.functions import FunctionAttack
from robustkit.registry.plugins import Plugin, plugins
from robustkit.training.nets import complete_arch

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "plugins.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)
FILES = {text.partition("\n")[0][2:]: text for _, text in BLOCKS if re.match(r"# [\w.]+\.\w+\n", text)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the page's files, in which commands run."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's package as pip leaves it: its modules on the path, beside what its pyproject.toml declares."""
    metadata = folder / "stranger-1.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.2\n\n")
    declared = re.sub(r'"(?=robustkit|\])|(?<== )"|"$', "", FILES["pyproject.toml"], flags=re.MULTILINE)
    groups = declared.replace("project.entry-points.", "").partition("[robustkit.")
    (metadata / "entry_points.txt").write_text("".join(groups[1:]).replace('"]', "]"))
    monkeypatch.syspath_prepend(folder)
    return folder


def shell(command: str, *more: str) -> int:
    return run([*shlex.split(command)[1:], *more])


@pytest.mark.parametrize("command", [c for kind, text in BLOCKS if kind == "sh" for c in text.splitlines()])
def test_the_commands_of_the_page_run(command: str, installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = {"evaluate": ("--limit", "4", "--no-html", "--out", "out"), "train": ("--limit", "64", "--out", "out")}
    assert shell(command, *more.get(command.split()[1], ())) == 0, capsys.readouterr().err
    if "list" in command:
        assert re.search(r"random-signs +linf l2 +decision +stranger 1.2 +Tries random", capsys.readouterr().out)


CALLS = [text for kind, text in BLOCKS if kind == "python" and text not in FILES.values()]
SLOW = "robustkit.testing"


@pytest.mark.parametrize(
    "text", [pytest.param(text, marks=[pytest.mark.slow] if SLOW in text else []) for text in CALLS]
)
def test_the_python_of_the_page_runs(text: str, installed: Path) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    exec(text, names)
    if "report" in names:
        assert names["report"].spec.suite[0]["name"] == "random-signs"
        assert names["x_adv"].shape == (8, 1, 8, 8)


def test_a_changed_file_is_another_run(folder: Path) -> None:
    def spec(text: str) -> dict[str, Any]:
        (entry,) = registry.parse_suite(text, "linf")
        return entry.spec

    before = spec("./random_signs.py:RandomSigns(queries=3)")
    assert before["name"] == "random-signs"
    assert before["queries"] == 3
    assert before["string"] == f"{folder}/random_signs.py:RandomSigns"
    assert spec("./random_signs.py:RandomSigns(queries=3)") == before
    (folder / "random_signs.py").write_text(FILES["random_signs.py"] + "# changed\n")
    after = spec("./random_signs.py:RandomSigns(queries=3)")
    assert after["code"] != before["code"]
    assert registry.spec(registry.make("pgd")).keys().isdisjoint({"code", "string", "package"})


def test_a_leaderboard_with_a_changed_file_is_another(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids: list[str] = []

    def record(models: object, id: str, *rest: object) -> int:
        ids.append(id)
        return 0

    monkeypatch.setattr("robustkit.cli.verbs.evaluate.run_leaderboard", record)
    (folder / "models.txt").write_text("robustkit:digits-cnn\n")
    command = "robustkit evaluate --models models.txt --data digits:test --suite"
    file = "./random_signs.py:RandomSigns"
    for suite, text in ((file, ""), (file, "# changed\n"), ("fgsm", "")):
        (folder / "random_signs.py").write_text(FILES["random_signs.py"] + text)
        assert shell(f"{command} {suite}") == 0
    assert len(set(ids)) == 3
    assert ids[2] == settings_id(data="digits:test", limit=None, threat="linf:0.15", suite="fgsm", seed=0)


def test_specs_of_packages_have_their_version_and_code(installed: Path) -> None:
    record = registry.spec(registry.make("random-signs", queries="5"))
    assert record == {"name": "random-signs", "queries": 5, "package": "stranger 1.2", "code": record["code"]}
    assert len(record["code"]) == 64
    assert registry.from_record("attack", record) == registry.make("random-signs", queries=5)
    model = robustkit.load_model("stranger:64")
    assert model.string == "stranger:64"
    assert model.fingerprint == robustkit.load_model("stranger:64").fingerprint


def test_objects_of_files_reach_workers(folder: Path) -> None:
    """They are pickled by their file, which no worker has imported."""
    for text in ("./random_signs.py:RandomSigns(queries=3)", "./noise.py:noise(scale=0.5)"):
        (entry,) = registry.parse_suite(text, "linf")
        assert pickle.loads(pickle.dumps(entry.attack)) == entry.attack


def test_code_that_a_record_names_is_not_run(folder: Path) -> None:
    string = "robustkit:digits-cnn?defense=./blur.py:Blur:3"
    assert shell(f"robustkit evaluate {string} --suite fgsm --limit 4 --no-html --out out") == 0
    assert shell("robustkit verify out") == 2
    assert shell("robustkit verify out --trust-code") == 0
    (folder / "models.txt").write_text(f"{string}\n")
    assert shell("robustkit evaluate --models models.txt --data digits:test --limit 4 --suite fgsm --out all") == 2
    (entry,) = registry.parse_suite("./random_signs.py:RandomSigns", "linf")
    with pytest.raises(UsageError, match="--trust-code"):
        registry.from_record("attack", entry.spec)
    assert registry.from_record("attack", entry.spec, trust_code=True) == entry.attack


def test_a_package_replaces_no_name_and_breaks_no_list(installed: Path) -> None:
    points = installed / "stranger-1.2.dist-info" / "entry_points.txt"
    points.write_text("[robustkit.attacks]\npgd = random_signs:RandomSigns\nlost = nowhere:Lost\n")
    registry.entries._catalog.cache_clear()
    plugins.__globals__["_scan"].cache_clear()
    assert registry.catalog("attack")["pgd"].package == ""
    assert type(registry.make("pgd")).__name__ == "PGD"
    with pytest.raises(UsageError, match=r"'lost' of the package stranger 1\.2 cannot be imported"):
        registry.make("lost")
    assert shell("robustkit list attacks") == 0
    registry.entries._catalog.cache_clear()
    plugins.__globals__["_scan"].cache_clear()


def test_names_have_hyphens(folder: Path) -> None:
    with pytest.raises(UsageError, match="'my_sources': write 'my-sources'; names have hyphens"):
        Plugin("models", "my_sources", "blur", "Blur", "stranger 1.2").load()
    text = FILES["random_signs.py"].replace('@attack("random-signs"', '@attack("random_signs"')
    (folder / "random_signs.py").write_text(text)
    with pytest.raises(UsageError, match="'random_signs': write 'random-signs'; names have hyphens"):
        registry.parse_suite("./random_signs.py:RandomSigns", "linf")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("./absent.py:A", "there is no file '.*absent.py'"),
        ("./blur.py:Blurred", "has no class or function 'Blurred'; it defines Blur"),
        ("./blur.py:Blur", r"is a defense, not an attack: put @attack\(\.\.\.\)"),
        ("./random_signs.py:RandomSigns(tries=3)", "no field of .*RandomSigns 'tries'.*Known: queries"),
        ("./noise.py:noise(size=3)", "no field of noise 'size'. .*Known: scale"),
        ("random-signs", "no suite or attack 'random-signs'"),
    ],
)
def test_bad_input_is_one_sentence(text: str, sentence: str, folder: Path) -> None:
    with pytest.raises(UsageError, match=sentence):
        registry.parse_suite(text, "linf")


def test_a_function_is_an_attack_and_an_unregistered_class_is_none() -> None:
    def shift(model: Any, x: torch.Tensor, y: torch.Tensor, eps: float) -> torch.Tensor:
        return x + eps

    class Unregistered:
        def __call__(self, model: Any, x: Any, goal: Any, threat: Any, *, rng: Any) -> Any:
            return x

    first, second = registry.parse_suite([shift, "fgsm"], "linf")
    assert isinstance(first.attack, FunctionAttack)
    assert (first.name, second.name) == ("shift", "fgsm")
    wrong: Any
    for wrong in (Unregistered, Unregistered(), 3):
        with pytest.raises(UsageError, match="is no attack: pass a name"):
            registry.parse_suite([wrong], "linf")
    with pytest.raises(UsageError, match="has no attack"):
        registry.parse_suite([], "linf")


def test_attack_returns_verified_successes_and_other_images_unchanged() -> None:
    model, data = robustkit.load_model("robustkit:digits-cnn"), robustkit.load_data("digits:test").head(24)
    x, y = data.images(range(24)), data.labels
    found = robustkit.attack(model, x, y, "linf:0.15", "pgd(steps=5),square(queries=20)")
    moved = (found != x).flatten(1).any(1)
    assert 0 < int(moved.sum()) < 24
    assert robustkit.ThreatModel.parse("linf:0.15").contains(found, x).all()
    with torch.no_grad():
        right, broken = (model(images).argmax(1) == torch.from_numpy(y) for images in (x, found))
    assert not (moved & (broken | ~right)).any()
    for suite, word in (("auto", "robustkit.evaluate"), ("pgd@mean-logit", "robustkit.evaluate")):
        with pytest.raises(UsageError, match=word):
            robustkit.attack(model, x, y, "linf:0.15", suite)


@pytest.mark.slow
def test_two_workers_run_a_file_and_a_killed_run_continues(folder: Path) -> None:
    command = "robustkit evaluate --limit 6 --no-html --suite './random_signs.py:RandomSigns(queries=3),fgsm'"
    assert shell(command, "--out", "one") == 0
    assert shell(command, "--out", "two", "--workers", "2") == 0
    one, two = (json.loads((folder / name / "report.json").read_text()) for name in ("one", "two"))
    assert one["verdicts"] == two["verdicts"]
    assert one["run_id"] == two["run_id"]
    (folder / "one" / "report.json").unlink()  # what a run that was killed at its end leaves
    assert shell(command, "--out", "one") == 0
    assert json.loads((folder / "one" / "report.json").read_text())["verdicts"] == one["verdicts"]


@pytest.mark.parametrize(
    "string",
    ["stranger:./net.py", "stranger:8?path=/a/nets.PKL", "stranger:8?code=net.py:build", "stranger:/a/w.pt"],
)
def test_files_that_a_record_gives_to_a_package_need_trust(string: str, installed: Path) -> None:
    with pytest.raises(UsageError, match="names Python code"):
        recorded_model(string, "report.json", False)
    with pytest.raises(UsageError, match="is not the absolute path"):
        recorded_model("stranger:8?folder=../nets", "report.json", True)
    assert recorded_model("stranger:8?folder=/nets&name=v1.5", "report.json", False)


def test_a_package_declares_its_model_source_as_built_in_ones_do(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (installed / "stranger_models.py").write_text(SOURCE)
    monkeypatch.delitem(sys.modules, "stranger_models", raising=False)
    model = robustkit.load_model("stranger:64?num_classes=3", seed=1)
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
    assert model.fingerprint != robustkit.load_model("stranger:64?num_classes=2").fingerprint
    with pytest.raises(UsageError, match=r"no field of stranger models 'classes'. Did you mean 'num_classes'"):
        robustkit.load_model("stranger:64?classes=3")
    with pytest.raises(UsageError, match="did you mean 'robustkit:digits-cnn'"):
        robustkit.load_model("robustkitt:digits-cnn")
    assert plugins("models")["stranger"].summary == "linear nets"
    recorded_model("stranger:64", "report.json", False)
    arch = complete_arch("stranger:64", classes=5, channels=1)
    assert arch.options == {"pretrained": "false", "num_classes": "5"}
    (installed / "stranger_models.py").write_text(SOURCE.replace("help=", "runs_code=True, help="))
    sys.modules.pop("stranger_models")
    with pytest.raises(UsageError, match="names Python code, 'stranger:64'"):
        recorded_model("stranger:64", "report.json", False)


SOURCE = """
from torch import nn
from robustkit.models.sources.built import Built
from robustkit.models.sources.source import ModelSource

def linear(spec, options, weights):
    classes = options.num_classes or 10
    net = nn.Sequential(nn.Flatten(), nn.Linear(int(spec.name), classes))
    return Built(net, spec.arch, {"num_classes": classes}, num_classes=classes)

build = ModelSource("stranger", help="linear nets", build=linear, fields=frozenset({"num_classes", "pretrained"}))
"""
