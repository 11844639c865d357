"""The registry: names from files, fields from text, suites, and an attack from another file."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import robustkit
from robustkit import registry
from robustkit.core.errors import UsageError
from robustkit.core.step_size import StepSize
from robustkit.registry import strings
from robustkit.registry.source_text import read_entries

ATTACKS = sorted(name for name, entry in registry.catalog("attack").items() if not entry.info.family)


def in_subprocess(code, cwd=None, **environment):
    environment = {**os.environ, **environment}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=120)


def sentence(error):
    message = str(error.value)
    assert message[-1] in ".?"
    assert "\n" not in message
    return message


# Names.


def test_the_catalog_imports_no_torch():
    code = (
        "import sys; from robustkit import registry\n"
        "for kind in ('attack', 'technique', 'recipe', 'defense', 'suite'): registry.catalog(kind)\n"
        "try: registry.make('pdg')\n"
        "except ValueError as error: print(error)\n"
        "print([name for name in ('torch', 'timm', 'foolbox', 'pyautoattack') if name in sys.modules])"
    )
    done = in_subprocess(code)
    assert done.returncode == 0, done.stderr
    hint, loaded = done.stdout.splitlines()
    assert hint.startswith("no attack 'pdg'. Did you mean 'pgd'? Known: ")
    assert loaded == "[]"


@pytest.mark.parametrize("kind", ["attack", "technique", "recipe", "defense", "suite"])
def test_names_are_made_of_their_files_stem(kind):
    for name, entry in registry.catalog(kind).items():
        stem = entry.module.rpartition(".")[2].replace("_", "-")
        ends_so = kind == "recipe" and name.endswith(f"-{stem}")
        assert name == stem or ends_so or name.startswith((f"{stem}-", f"{stem}:", f"{stem}+")), name


def test_the_source_text_has_the_names_that_the_decorator_registers():
    for name, entry in registry.catalog("attack").items():
        kind = registry.find("attack", name)
        assert kind.info == entry.info
        assert entry.summary.endswith((".", "`."))
        assert entry.info.paper
        assert entry.info.norms
        assert set(entry.info.norms) <= {"linf", "l2", "l1"}
        assert entry.info.access in ("gradient", "score", "decision", "any")


@pytest.mark.parametrize("name", ["pdg", "", "pgd ", "PGD", "nothing:like", "autoattack:apgd"])
def test_unknown_attacks(name):
    with pytest.raises(UsageError) as error:
        registry.make(name)
    assert sentence(error).startswith(f"no attack {name!r}.")


@pytest.mark.parametrize(
    ("version", "suite"),
    [("standard", "autoattack"), ("plus", "autoattack-plus"), ("rand", "autoattack-rand")],
)
def test_autoattacks_own_names_point_to_its_suites(version, suite):
    for text in (version, version.upper(), f"fgsm,{version}", f"fgsm,AutoAttack-{version.title()}"):
        with pytest.raises(UsageError) as error:
            registry.parse_suite(text, "linf")
        assert sentence(error).endswith(f"is {suite!r} here; write it.")
    assert registry.parse_suite(suite, "linf")


@pytest.mark.parametrize(("name", "meant"), [("PGD", "pgd"), ("pgd-20", "pgd"), ("AutoAttack", "autoattack")])
def test_other_peoples_spellings_find_the_name(name, meant):
    with pytest.raises(UsageError, match=f"Did you mean '{meant}'"):
        registry.parse_suite(name, "linf")


def test_unknown_fields_name_the_nearest():
    with pytest.raises(UsageError) as error:
        registry.make("pgd", stpes=3)
    assert sentence(error).startswith("no field of pgd 'stpes'. Did you mean 'steps'? Known: density,")


def test_a_family_wants_a_member():
    for text in ("foolbox", "foolbox:", "foolbox(steps=3)"):
        with pytest.raises(UsageError, match="foolbox:NAME"):
            registry.parse_suite(text, "linf")
    with pytest.raises(UsageError, match="Did you mean 'LinfPGD'"):
        registry.make("foolbox:LinfPDG")
    with pytest.raises(UsageError, match="Did you mean 'steps'"):
        registry.make("foolbox:LinfPGD", stesp=3)


# Fields.


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"steps": "7"}, {"steps": 7}),
        ({"steps": 7.0}, {"steps": 7}),
        ({"step_size": "8/255px"}, {"step_size": StepSize(8 / 255, "px")}),
        ({"step_size": "1e-1"}, {"step_size": StepSize(0.1)}),
        ({"step_size": 1}, {"step_size": StepSize(1.0)}),
        ({"random_start": "false"}, {"random_start": False}),
        ({"random_start": "True"}, {"random_start": True}),
        ({"loss": "dlr"}, {"loss": "dlr"}),
    ],
)
def test_fields_are_converted(fields, expected):
    made = registry.make("pgd", **fields)
    for name, value in expected.items():
        assert getattr(made, name) == value
        assert type(getattr(made, name)) is type(value)


@pytest.mark.parametrize("text", ["none", "None", "null", None])
def test_none_where_it_is_allowed(text):
    assert registry.make("autoattack:apgd-ce", restarts=text).restarts is None
    assert registry.make("autoattack:apgd-ce", large_start=text).large_start is None
    with pytest.raises(UsageError):
        registry.make("pgd", steps=text)


def test_optional_fields_still_take_values():
    made = registry.make("autoattack:apgd-ce", restarts="3", large_start="true")
    assert (made.restarts, made.large_start) == (3, True)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[
            ("steps", value)
            for value in ("many", "7.5", 7.5, True, "true", "1e3", [7], float("inf"), float("nan"))
        ],
        *[("steps", value) for value in (0, "0", -1, 10**400)],
        *[("restarts", value) for value in (0, "-3")],
        *[("step_size", value) for value in ("big", "1/0", True, "nan", "inf", "1e400", [0.1])],
        *[("random_start", value) for value in ("yes", 1, 0, "1")],
        *[("loss", value) for value in (3, "nothing", None)],
    ],
)
def test_wrong_values_are_refused_before_anything_runs(field, value):
    with pytest.raises(UsageError) as error:
        registry.make("pgd", **{field: value})
    sentence(error)


@pytest.mark.parametrize("name", [*ATTACKS, "foolbox:LinfPGD", "foolbox:L2DeepFoolAttack"])
def test_specs_make_the_same_attack_again(name):
    made = registry.make(name, **({"steps": "3"} if name == "foolbox:LinfPGD" else {}))
    record = json.loads(json.dumps(registry.spec(made)))
    assert record["name"] == name
    assert registry.from_record("attack", record) == made


def test_changed_fields_survive_the_round_trip():
    made = registry.make("pgd", steps=3, step_size="1/7eps", random_start="false", loss="dlr", restarts=2)
    assert registry.from_record("attack", json.loads(json.dumps(registry.spec(made)))) == made
    assert registry.spec(made)["step_size"] == 1 / 7


# Suites.


def names(text, norm="linf"):
    return [entry.name for entry in registry.parse_suite(text, norm)]


def test_suites_are_expanded_in_order():
    own = names("autoattack")
    assert own == ["autoattack:apgd-ce", "autoattack:apgd-t", "autoattack:fab-t", "autoattack:square"]
    assert names("fgsm, autoattack ,pgd(steps=3)") == ["fgsm", *own, "pgd"]


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_adaptive_climbs_every_view_that_there_may_be(norm):
    """Each rung of the ladder among them; `auto` has the same, spared where nothing is in doubt."""
    wanted = set(registry.VIEWS) - ({"stack"} if norm == "l1" else set())
    adaptive, auto = (registry.parse_suite(suite, norm) for suite in ("adaptive", "auto"))
    assert {entry.view for entry in adaptive} - {""} == wanted
    assert [entry.attack for entry in auto] == [entry.attack for entry in adaptive]
    assert all(entry.conditional for entry in auto if entry.view)


@pytest.mark.parametrize("suite", sorted(registry.catalog("suite")))
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_every_suite_can_be_made_in_the_norms_of_its_attacks(suite, norm):
    if (suite, norm) == ("blackbox-labels", "l1"):
        pytest.skip("no attack by labels is known in l1")
    assert names(suite, norm)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pgd", [{}]),
        ("pgd()", [{}]),
        (" pgd(steps=3) ", [{"steps": 3}]),
        ("pgd( steps = 3 , loss = dlr )", [{"steps": 3, "loss": "dlr"}]),
        ("pgd(steps=3,restarts=2),pgd(steps=4)", [{"steps": 3, "restarts": 2}, {"steps": 4}]),
        ("foolbox:LinfPGD(steps=3,random_start=false),pgd", [{"steps": 3, "random_start": False}, {}]),
    ],
)
def test_attacks_with_fields(text, expected):
    for made, fields in zip(registry.parse_suite(text, "linf"), expected, strict=True):
        assert {name: made.spec[name] for name in fields} == fields


def test_attacks_on_views():
    direct, viewed = registry.parse_suite("pgd(steps=3),pgd(steps=3)@mean-logit", "linf")
    assert (direct.view, viewed.view, viewed.name) == ("", "mean-logit", "pgd@mean-logit")
    assert viewed.spec == {**direct.spec, "view": "mean-logit"}
    for text, word in (("pgd@mean-logits", "mean-logit"), ("rapid@mended", "no view"), ("pgd@a@b", "view")):
        with pytest.raises(UsageError, match=word):
            registry.parse_suite(text, "linf")


def test_brackets_may_nest():
    text = "foolbox:SpatialAttack(num_rotations=3,grid_search=true),pgd"
    assert names(text) == ["foolbox:SpatialAttack", "pgd"]
    assert strings.split("a(b=3,c=(1,2)),d([1,(2,3)],e={4,5}),f") == [
        "a(b=3,c=(1,2))",
        "d([1,(2,3)],e={4,5})",
        "f",
    ]
    assert strings.parse_call("a(b=3,c=(1, 2),d=[3,4])") == ("a", {"b": "3", "c": "(1, 2)", "d": "[3,4]"})


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", ",", "pgd,", ",pgd", "pgd,,fgsm", "pgd(steps=3", "pgd)steps=3(", "pgd(steps=3))"),
        *("pgd(3)", "pgd(steps)", "pgd(steps=)", "pgd(=3)", "pgd(steps=3,steps=4)", "pgd steps=3"),
        *("autoattack(steps=3)", "nothing", "pgd;fgsm", "pgd(steps=3)(steps=4)"),
    ],
)
def test_bad_suites_get_one_sentence(text):
    with pytest.raises(UsageError) as error:
        registry.parse_suite(text, "linf")
    sentence(error)


def test_an_attack_outside_its_norms_is_refused():
    with pytest.raises(UsageError) as error:
        registry.parse_suite("pgd,foolbox:LinfPGD", "l2")
    assert sentence(error) == "foolbox:LinfPGD is not defined in l2; it works in linf."


# A stranger's file.

STRANGER = '''\
"""Noise on the border of the ball."""

from dataclasses import dataclass

from robustkit.registry import attack


@attack("loud-noise", paper="none", norms=("linf", "l2"), access="decision")
@dataclass(frozen=True, slots=True)
class LoudNoise:
    """Best of a few random starts."""

    tries: int = 3
    scale: float | None = None

    def __call__(self, model, x, goal, threat, *, rng):
        result = x.clone()
        for restart in range(self.tries):
            point = threat.random_start(x, rng.at(restart=restart))
            hit = goal.reached(model(point))
            result[hit] = point[hit]
        return result
'''


def test_another_package_adds_an_attack_with_one_file(tmp_path):
    assert len(STRANGER.splitlines()) < 40
    copy = tmp_path / "robustkit"
    home = Path(robustkit.__file__).parent
    shutil.copytree(home, copy, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    (copy / "attacks" / "loud.py").write_text(STRANGER)
    code = (
        "import json, robustkit, torch\n"
        "from robustkit import registry\n"
        "from robustkit.core.criteria import Goal\n"
        "from robustkit.core.rng import RowRng\n"
        "from robustkit.core.threat import ThreatModel\n"
        "entry = registry.catalog('attack')['loud-noise']\n"
        "(rung,) = registry.parse_suite('loud-noise(tries=5,scale=1/4)', 'l2')\n"
        "made = rung.attack\n"
        "assert registry.make(**registry.spec(made)) == made\n"
        "x, labels = torch.rand(5, 3, 7, 9), torch.zeros(5, dtype=torch.int64)\n"
        "threat = ThreatModel.parse('l2:1')\n"
        "found = made(lambda x: x.flatten(1)[:, :4], x, Goal(labels), threat, rng=RowRng(0, 's', labels))\n"
        "assert threat.contains(found, x).all()\n"
        "print(json.dumps([robustkit.__file__, entry.summary, registry.spec(made)]))\n"
        "registry.parse_suite('loud-nose', 'l2')\n"
    )
    done = in_subprocess(code, tmp_path, PYTHONPATH=str(tmp_path))
    assert done.stdout, done.stderr
    file, summary, spec = json.loads(done.stdout)
    assert file.startswith(str(tmp_path))
    assert summary == "Best of a few random starts."
    assert spec == {"name": "loud-noise", "tries": 5, "scale": 0.25}
    assert "Did you mean 'loud-noise'?" in done.stderr


def test_a_suite_has_an_end():
    with pytest.raises(UsageError, match=r"a suite of 100,000 attacks is too long: write at most 1,000"):
        registry.parse_suite(",".join(["pgd"] * 100_000), "linf")


@pytest.mark.parametrize("kind", ["attack", "technique", "defense", "method"])
def test_lists_name_every_field_inherited_ones_too(kind: str) -> None:
    """They are read from source text, bases in other files included; the imported classes say what is true."""
    for name, entry in registry.catalog(kind).items():
        thing = registry.find(kind, name)
        if dataclasses.is_dataclass(thing) and not entry.info.family:
            assert [field.name for field in entry.fields] == [
                f.name for f in dataclasses.fields(thing) if f.init
            ], name


def test_a_base_is_found_in_a_parenthesised_import() -> None:
    base = "from dataclasses import dataclass\n\n\n@dataclass(frozen=True)\nclass Base:\n    steps: int = 4\n"
    text = (
        "from elsewhere import (\n    Base,\n)\n\n\n@attack('sub', norms=('linf',), access='gradient')\n"
        "@dataclass(frozen=True)\nclass Sub(Base):\n    size: float = 0.5\n"
    )
    (entry,) = read_entries(text, "here", {"elsewhere": base}.__getitem__)
    assert [(field.name, field.default) for field in entry.fields] == [("steps", "4"), ("size", "0.5")]
