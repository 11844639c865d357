"""The command line: help, lists, flags, and output for terminals, pipes and scripts."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from robustkit.cli import run
from robustkit.registry import catalog, find, make

ROBUSTKIT = [sys.executable, "-m", "robustkit"]
SMALL = ["evaluate", "--limit", "12", "--suite", "fgsm"]
MAX_MODULES_OF_HELP = 260
QUIET = {**os.environ, "NO_COLOR": "", "TERM": "xterm-256color"}


def shell(*arguments: str, **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*ROBUSTKIT, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=QUIET,
        **more,  # type: ignore[call-overload]
    )


@pytest.mark.parametrize(
    "line",
    [
        *("--help", "evaluate --help", "verify -h", "report -h", "craft -h", "--version", "list"),
        *("train --help", "train csgld -h", "plan --help"),
    ],
)
def test_help_imports_no_torch_and_few_modules(line: str) -> None:
    code = (
        "import sys; from robustkit.cli import run\n"
        f"code = run({line.split()!r})\n"
        "slow = {'torch', 'torchvision', 'timm', 'foolbox', 'pyautoattack', 'sklearn', 'numpy'}\n"
        "heavy = slow & set(sys.modules)\n"
        "print(len(sys.modules), file=sys.stderr)\n"
        "sys.exit(code if not heavy else f'imported {heavy}')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    # The number of modules bounds the time of a start (0.3 s) and does not depend on the machine.
    assert int(done.stderr.split()[-1]) <= MAX_MODULES_OF_HELP


@pytest.mark.parametrize("kind", ["attack", "technique", "recipe", "method", "defense", "suite"])
def test_list_name_prints_fields_and_summary(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name, entry in catalog(kind).items():
        assert run(["list", name]) == 0
        out = capsys.readouterr().out
        assert entry.summary in out
        if kind == "recipe":
            assert f"is {find(kind, name)()}" in out
    assert run(["list", "cwa", "--json"]) == 0
    (facts,) = json.loads(capsys.readouterr().out)["cwa"]
    # Those of its base are its own.
    assert facts["fields"] == dataclasses.asdict(make("cwa"))
    assert facts["norms"] == ["linf", "l2"]


def test_help_leads_with_examples() -> None:
    text = shell("evaluate", "--help").stdout
    assert text.index("robustkit evaluate robustkit:cifar-resnet20@") < text.index("--data")
    for flag in ("--data", "--limit", "--threat", "--suite", "--seed", "--device", "--precision", "--batch-size"):
        assert flag in text
    assert "[default: 0" in text


def test_version() -> None:
    assert re.fullmatch(r"robustkit \d+\.\d+\.\d+\n", shell("--version").stdout)


def test_list_prints_every_registered_name() -> None:
    listed = json.loads(shell("list", "--json").stdout)
    assert {"fgsm", "pgd", "foolbox:NAME", "autoattack:apgd-ce"} <= {row["name"] for row in listed["attacks"]}
    suites = {
        "auto",
        "adaptive",
        "ensemble",
        "minimum-norm",
        "blackbox-scores",
        "blackbox-labels",
        "rapid",
        "rapid+autoattack",
    }
    assert suites | {"autoattack", "autoattack-plus", "autoattack-rand"} == {
        row["name"] for row in listed["suites"]
    }
    assert {"di", "vmi", "svre", "ghost"} <= {row["name"] for row in listed["techniques"]}
    assert {"vmi-fgsm", "vni-fgsm"} <= {row["name"] for row in listed["recipes"]}
    assert all(row["paper"] for row in listed["techniques"] + listed["recipes"])
    assert "robustkit:digits-cnn" in {row["name"] for row in listed["models"]}
    assert "digits:test" in {row["name"] for row in listed["data"]}
    assert {"bit-depth:BITS", "jpeg:QUALITY", "resize-pad:RATIO", "smoothing:SIGMA,COPIES"} == {
        row["name"] for row in listed["defenses"]
    }
    assert all(row["what"] for rows in listed.values() for row in rows)


@pytest.mark.slow
def test_piped_output_has_no_escape_codes_and_names_the_next_command(tmp_path: Path) -> None:
    done = shell(*SMALL, cwd=tmp_path)
    assert done.returncode == 0
    assert "\x1b" not in done.stdout + done.stderr
    assert max(len(line) for line in done.stdout.splitlines()) <= 80
    run_id = re.match(r"run ([0-9a-f]{8}) ", done.stdout)
    assert run_id
    assert done.stdout.splitlines()[-2:] == [
        f"report   runs/evaluate-{run_id[1]}/report.html",
        f"next     robustkit verify runs/evaluate-{run_id[1]}",
    ]
    # the same command again: the stored result, and it says so
    again = shell(*SMALL, cwd=tmp_path)
    assert again.stdout == done.stdout
    assert "was finished before; this is its stored result (see --overwrite)" in again.stderr
    # and the command that it names works
    check = shell(*done.stdout.splitlines()[-1].split()[2:], cwd=tmp_path)
    assert check.returncode == 0
    assert "all good" in check.stdout


def test_json_is_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run([*SMALL, "--out", "r", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(Path("r/report.json").read_text())
    assert next(iter(printed)) == "format"
    assert {
        "format",
        "run_id",
        "spec",
        "n",
        "clean_accuracy",
        "robust_accuracy",
        "stages",
        "cost",
        "flags",
        "verdicts",
        "environment",
    } <= set(printed)
    assert set(printed["robust_accuracy"]) == {"value", "low", "high", "n"}
    assert set(printed["stages"][1]) == {
        "attack",
        "robust_accuracy",
        "fooled",
        "forwards",
        "backwards",
        "seconds",
    }
    assert set(printed["verdicts"][0]) == {"index", "label", "clean_prediction", "robust", "attack", "margin"}
    assert set(printed["cost"]) == {"forwards", "backwards", "seconds"}
    assert {verdict["attack"] for verdict in printed["verdicts"]} <= {"clean", "fgsm", None}
    assert {"versions", "device", "commit", "precision"} <= set(printed["environment"])
    assert sorted(path.name for path in Path("r").iterdir() if path.name[0] != ".") == [
        "adversarial.npz",
        "examples.npz",
        "ledger.sqlite",
        "report.html",
        "report.json",
        "spec.json",
    ]


def test_every_flag_reaches_the_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    suite = "pgd(steps=3,step_size=1/4eps,restarts=2,loss=margin,random_start=false),autoattack:square(queries=5)"
    flags = ["--threat", "l2:0.25", "--suite", suite, "--seed", "7", "--batch-size", "5", "--limit", "11"]
    assert (
        run(["evaluate", "--data", "digits:train", *flags, "--precision", "bf16", "--device", "cpu", "--out", "r"])
        == 0
    )
    spec = json.loads(Path("r/spec.json").read_text())
    assert spec["threat"].startswith("l2:")
    assert spec["data"]["string"] == "digits:train"
    assert (spec["data"]["n"], spec["seed"], spec["batch_size"], spec["verb"]) == (11, 7, 5, "evaluate")
    assert spec["suite"] == [
        {
            "name": "pgd",
            "steps": 3,
            "step_size": 0.25,
            "restarts": 2,
            "loss": "margin",
            "random_start": False,
            "density": 0.01,
        },
        {"name": "autoattack:square", "queries": 5, "restarts": 1},
    ]
    environment = json.loads(Path("r/report.json").read_text())["environment"]
    assert (environment["precision"], environment["device"]) == ("bf16", "cpu")


def test_batch_size_and_precision_do_not_change_the_run_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--batch-size", "3"], ["--precision", "bf16"]):
        assert run([*SMALL, *more]) == 0
    assert len(list(Path("runs").iterdir())) == 1


@pytest.mark.parametrize("threat", ["linf:0.25", "l2:1.5", "l1:8"])
def test_foolbox_attacks_are_evaluated_and_verified(
    threat: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"linf": "LinfPGD", "l2": "L2DeepFoolAttack(steps=20)", "l1": "L1PGD(steps=10)"}
    name = names[threat.partition(":")[0]]
    assert run(["evaluate", "--limit", "24", "--threat", threat, "--suite", f"foolbox:{name}", "--out", "r"]) == 0
    report = json.loads(Path("r/report.json").read_text())
    assert report["stages"][1]["attack"] == "foolbox:" + name.partition("(")[0]
    assert report["stages"][1]["fooled"] > 0
    assert run(["verify", "r"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["timm", "torchvision"])
def test_timm_and_torchvision_models_are_evaluated(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.savez("d.npz", x=rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8), y=np.arange(6))
    name = {"timm": "timm:test_resnet", "torchvision": "torchvision:shufflenet_v2_x0_5"}[kind]
    command = [f"{name}?pretrained=false&num_classes=10", "--data", "d.npz", "--threat", "linf:4/255"]
    assert run(["evaluate", *command, "--suite", "fgsm,autoattack:apgd-ce(steps=3)", "--out", "r"]) == 0
    assert run(["verify", "r"]) == 0


def test_an_image_folder_is_preprocessed_as_for_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for number in range(6):
        place = Path("val") / f"class{number % 3}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (40 + number, 52, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.png")
    model = "timm:test_resnet?pretrained=false&num_classes=3&size=48"
    assert (
        run(["evaluate", model, "--data", "folder:val", "--threat", "linf:4/255", "--suite", "fgsm", "--out", "r"])
        == 0
    )
    assert json.loads(Path("r/report.json").read_text())["n"] == 6
    assert run(["verify", "r"]) == 0


def test_an_interrupted_run_says_that_it_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["evaluate", "--limit", "8", "--suite", "fgsm,pgd(steps=3)", "--no-html", "--out", "r"]
    with monkeypatch.context() as patch:
        patch.setattr(find("attack", "pgd"), "step", lambda *_: signal.raise_signal(signal.SIGINT))
        assert run(command) == 130
    err = capsys.readouterr().err
    assert "interrupted; the same command resumes" in err
    assert "Traceback" not in err
    assert not Path("r/report.json").exists()
    assert run(command) == 0
    assert "resuming" in capsys.readouterr().err


@pytest.mark.parametrize("kills", [pytest.param(20, marks=pytest.mark.slow), 2])
@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_report(kills: int, tmp_path: Path) -> None:
    """kill -9, then the same command: same report but for times, and no finished chunk runs twice."""
    script = Path(__file__).parents[2] / "scripts" / "tools" / "kill_and_resume.py"
    done = subprocess.run(
        [sys.executable, str(script), "--kills", str(kills), "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "same report" in done.stdout


def test_brackets_in_a_path_are_printed_literally(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run([*SMALL, "--no-html", "--out", "mine[red]"]) == 0
    assert "robustkit verify mine[red]" in capsys.readouterr().out
