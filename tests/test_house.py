"""The structure of the package: the order of imports, the content of the wheel, the code blocks of README."""

from __future__ import annotations

import ast
import configparser
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "robustkit"
LINKS = ("attacks", "defenses")

# Rooms from the ground up: each imports only from those before it.
ORDER = (
    *("core", "registry", "data", "sampling", "posterior", "attack_api", "models", "runs", "gradient_views"),
    *(
        "reporting",
        "distributed",
        "checks",
        "engine",
        "training",
        "diagnostics",
        "crafting",
        "api",
        "cli",
        "testing",
    ),
)
# What attacks and defenses may import beside each other inside their own folder. Nobody imports them: they are
# found by the registry.
PLUGINS = ("core", "registry", "attack_api", "sampling", "models", "training")
# Parts of a room that plug-ins may import.
OPEN = {
    "models": ("models.layers.", "models.ensembles.aggregation.", "models.randomness."),
    "training": tuple(
        f"training.{one}" for one in ("method.", "posterior_method.", "wrapping_method.", "ensemble_utils")
    ),
}
# Only these may name the packages that are slow to import or belong to one adapter.
ADAPTERS = {
    "ray": {"distributed/ray_actors.py"},
    "lightning_fabric": {
        "training/loop.py",
        "training/parallel/processes.py",
        "training/parallel/data_parallel.py",
    },
    "timm": {"models/sources/from_timm.py", "data/classes.py"},
    "torchvision": {
        "models/sources/from_torchvision.py",
        "data/sources/torchvision_sets.py",
        "data/decoding.py",
    },
    "foolbox": {"attacks/official/foolbox.py"},
    "pyautoattack": {"attacks/official/autoattack.py"},
    "sklearn": {"data/sources/digits.py"},
}


def sources() -> list[Path]:
    inside = [file for file in PACKAGE.rglob("*.py") if file.relative_to(PACKAGE).parts[0] not in LINKS]
    return inside + [file for link in LINKS for file in (PACKAGE / link).rglob("*.py")]


def imported(file: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            found += [f"{node.module}.{name.name}" for name in node.names]
    return found


def may_import(room: str, name: str) -> bool:
    """Whether a room may import a name of another one, such as `core.threat.ThreatModel`."""
    other = name.partition(".")[0]
    if other == "version":
        return True
    if room in LINKS:
        return other in PLUGINS and name.startswith(OPEN.get(other, (other,)))
    return other in ORDER and ORDER.index(other) < ORDER.index(room)


def test_imports_follow_the_order_of_packages() -> None:
    for file in sources():
        place = file.relative_to(PACKAGE)
        room = place.parts[0]
        if len(place.parts) == 1:
            continue
        for name in imported(file):
            inside = name.removeprefix("robustkit.")
            if inside != name and inside.partition(".")[0] != room:
                assert may_import(room, inside), f"{place} imports {name}"


def test_other_packages_stay_in_their_adapters() -> None:
    for file in sources():
        place = str(file.relative_to(PACKAGE))
        for name in imported(file):
            package = name.partition(".")[0]
            assert place in ADAPTERS.get(package, {place}), f"{place} imports {name}"


def copy_of_the_checkout(to: Path) -> Path:
    """What a clone holds, links as links."""
    for name in ("robustkit", "attacks", "defenses", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, to / name)
    return to


def clone_without_links(to: Path) -> Path:
    """A clone whose links git wrote as text files, as it does without support for symlinks."""
    clone = copy_of_the_checkout(to)
    for link in LINKS:
        (clone / "robustkit" / link).unlink()
        (clone / "robustkit" / link).write_text(f"../{link}")
    return clone


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a clone without links."""
    clone = clone_without_links(tmp_path_factory.mktemp("clone"))
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(out),
        str(clone),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_setup_cfg_lists_every_package() -> None:
    """Packages are named one by one, since two of them are links that a clone may lack."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    found = {".".join(("robustkit", *file.relative_to(PACKAGE).parent.parts)) for file in sources()}
    listed = setup["options"]["packages"].split()
    assert listed == sorted(found), f"write these below packages= in setup.cfg: {sorted(found)}"
    assert all((PACKAGE.joinpath(*name.split(".")[1:]) / "__init__.py").is_file() for name in listed)


def test_the_wheel_holds_every_file(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    for file in [
        *sources(),
        *PACKAGE.glob("weights/*"),
        *PACKAGE.glob("reporting/html/*.css"),
        *PACKAGE.glob("reporting/html/*.html"),
        PACKAGE / "py.typed",
    ]:
        assert f"robustkit/{file.relative_to(PACKAGE)}" in inside
    tops = {name.partition("/")[0] for name in inside}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"robustkit"}
    metadata = next(name for name in inside if name.endswith("entry_points.txt"))
    assert "robustkit = robustkit.cli:main" in zipfile.ZipFile(wheel).read(metadata).decode()


def test_the_installed_wheel_runs_from_elsewhere(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    code = (
        "import robustkit, sys; from robustkit.cli import run\n"
        "print(robustkit.__file__, flush=True); sys.exit(run(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "evaluate", "--limit", "2", "--suite", "fgsm,pgd(steps=3)"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "site"))
    assert "worst case" in done.stdout


@pytest.mark.parametrize("folder", ["attacks", "defenses"])
def test_the_links_and_their_guards(folder: str) -> None:
    assert os.readlink(PACKAGE / folder) == f"../{folder}"
    done = subprocess.run([sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True)
    assert f"import 'robustkit.{folder}', not '{folder}'" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("how", [["-e"], []], ids=["editable", "plain"])
def test_a_clone_without_links_can_be_installed(how: list[str], tmp_path: Path) -> None:
    clone = clone_without_links(tmp_path)
    bin = tmp_path / "venv" / "bin"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(sys.executable, "-m", "venv", "--without-pip", bin.parent)
    outer = Path(sysconfig.get_path("purelib"))
    next(bin.parent.glob("lib/python*/site-packages")).joinpath("outer.pth").write_text(f"{outer}\n")
    pip = (sys.executable, "-m", "pip", "--python", bin / "python", "install", "--no-deps", "--no-build-isolation")
    run(*pip, "--force-reinstall", *how, clone)
    assert "worst case" in run(bin / "robustkit", "evaluate", "--limit", "8", "--suite", "fgsm,pgd(steps=3)")
    assert {"pgd", "square"} <= {
        row["name"] for row in json.loads(run(bin / "robustkit", "list", "--json"))["attacks"]
    }


def test_images_are_opened_by_named_formats_only() -> None:
    """Without formats= Pillow asks every decoder it has: a file of PostScript goes to Ghostscript."""
    for file in [*sources(), *ROOT.glob("scripts/**/*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open":
                assert "formats" in {word.arg for word in node.keywords}, f"{file}:{node.lineno}"


def test_every_planted_fault_has_its_place() -> None:
    faults = runpy.run_path(str(ROOT / "scripts/tools/mutation_table.py"))["FAULTS"]
    lost = [
        (fault.name, old)
        for fault in faults
        for old, _ in fault.changes
        if old not in (ROOT / fault.file).read_text()
    ]
    assert not lost
    table = (ROOT / "docs/mutation_table.md").read_text()
    assert not [fault.name for fault in faults if f"| {fault.name} | `{fault.file}` |" not in table]


def test_nobody_is_told_to_install_a_stranger(wheel: Path) -> None:
    """On PyPI robustkit is another project; what else is named to install is a dependency of ours."""
    assert wheel.name.startswith("adversarial_robustkit-")
    texts = [*sources(), *PACKAGE.glob("reporting/html/*.html"), *ROOT.glob("docs/*.md"), ROOT / "README.md"]
    named = [name for file in texts for name in re.findall(r"pip install ([^\s,;:`]+)", file.read_text())]
    others = {name.strip("'").split("[")[0] for name in named if not name.startswith((".", "'."))}
    extras = re.findall(
        r"^    ([\w-]+)>=", (ROOT / "setup.cfg").read_text().partition("extras_require")[2], re.MULTILINE
    )
    assert others <= set(extras)


STRANGER = '''\
"""The basic iterative method (Kurakin et al. 2017, arXiv:1607.02533)."""

from dataclasses import dataclass

from robustkit.registry import attack
from robustkit.attack_api import RowWise


@attack("bim", paper="arXiv:1607.02533", norms=("linf", "l2"), access="gradient")
@dataclass(frozen=True, slots=True)
class BIM(RowWise):
    """Signed steps from the clean image, without a random start."""

    steps: int = 40
    step_size: float = 0.1
    loss: str = "margin"

    def init(self, rows):
        return {"x": rows.x}

    def step(self, rows, state, answer):
        size = self.step_size * float(rows.threat.eps)
        return {"x": rows.threat.project(state["x"] + size * rows.threat.ascent(answer.gradient), rows.x)}
'''


@pytest.mark.slow
def test_an_attack_outside_the_package_is_one_file(tmp_path: Path) -> None:
    """It is in the list, the suite, the spec, the run and the contract tests, with nothing else touched."""
    assert len(STRANGER.splitlines()) < 40
    clone = copy_of_the_checkout(tmp_path)
    shutil.copytree(ROOT / "tests" / "contract", clone / "tests" / "contract")
    shutil.copy(ROOT / "tests" / "conftest.py", clone / "tests")
    (clone / "attacks" / "gradient" / "bim.py").write_text(STRANGER)

    def inside(*command: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(clone)}
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=clone,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert {"bim"} <= {
        row["name"] for row in json.loads(inside("robustkit", "list", "attacks", "--json"))["attacks"]
    }
    inside("robustkit", "evaluate", "--limit", "12", "--suite", "bim(steps=7)", "--out", "r", "--no-html")
    suite = json.loads((clone / "r" / "spec.json").read_text())["suite"]
    assert suite == [{"name": "bim", "steps": 7, "step_size": 0.1, "loss": "margin"}]
    ran = inside("pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "tests/contract", "-k", "bim")
    passed = re.search(r"(\d+) passed", ran)
    assert passed
    assert int(passed[1]) >= 20


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_every_command_in_the_readme_is_understood(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Flags exist: each command, made to stop at a model that is not there, complains of that and no flag."""
    import shlex

    from robustkit.cli import run

    commands = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("robustkit ")]
    assert len(commands) >= 5
    for command in commands:
        words = shlex.split(command, comments=True)[1:]
        if words[0] == "evaluate":
            words += ["--precision", "fp8", "--data", "digits:test", "--out", str(tmp_path)]
        if words[0] == "train":
            words += ["--device", "nowhere"]
        run(words)
        err = capsys.readouterr().err
        assert "No such option" not in err, command
        assert "No such command" not in err, command


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from robustkit import load_data, load_model

    monkeypatch.chdir(tmp_path)
    data = load_data("digits:test").head(3)
    images, labels = data.images(range(3)), data.labels
    names: dict[str, Any] = {"model": load_model("robustkit:digits-cnn"), "images": images, "labels": labels}
    names["loader"] = [(images[:2], labels[:2]), (images[2:], labels[2:])]
    ran = 0
    for block in blocks("python"):
        if "import evaluate" in block:
            short = block.replace("8/255", "0.1").replace("seed=0", "suite='fgsm'")
            short = short.replace('images, labels, "l2"', 'images[:1], labels[:1], "l2", attack="ddn(steps=5)"')
            exec(short.replace('threat="linf:0.1"', "threat='linf:0.1', suite='fgsm'"), names)
            ran += 1
    assert ran
    assert names["report"].n == 3


def test_every_flags_code_is_known() -> None:
    """`--fail-on-flag CODE` refuses codes that no run raises; so the list has to have all."""
    from robustkit.checks.flag_codes import CODES

    found = set()
    for file in (ROOT / "robustkit").rglob("*.py"):
        text = file.read_text()
        found |= set(re.findall(r'\b(?:Flag|passed|unmeasured)\(\s*"([a-z0-9-]+)"', text))
        found |= set(re.findall(r'^\s+code(?:, \w+)* = "([a-z0-9-]+)"', text, re.MULTILINE))
        found |= set(re.findall(r'^AUDIT_BROKE = "([a-z-]+)"', text, re.MULTILINE))
    assert found <= set(CODES), "add these to robustkit/checks/flag_codes.py"
