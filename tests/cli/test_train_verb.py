"""`train` on the command line."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from robustkit import registry
from robustkit.cli import run
from robustkit.core.step_size import StepSize
from robustkit.registry import make_method
from robustkit.reporting.html.training import command
from robustkit.runs.training_record import TrainSpec

SHORT = ["--limit", "48", "--epochs", "3", "--batch-size", "16", "--lr", "0.1"]
FLAGS = {
    "--data": "digits:train",
    "--test": "digits:test",
    "--arch": "robustkit:cifar-resnet20",
    "--limit": "40",
    "--epochs": "7",
    "--batch-size": "8",
    "--lr": "0.025",
    "--members": "3",
    "--ema": "0.5",
    "--augment": "crop",
    "--seed": "5",
    "--precision": "bf16",
}


@pytest.fixture
def specs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What would be run, in place of running it."""
    from robustkit.core.errors import UsageError
    from robustkit.runs.spec import dumps
    from robustkit.training.train import Training

    found: list[dict[str, Any]] = []

    def instead(plan: Training, folder: Path, progress: object, overwrite: bool) -> None:
        shared = (plan.devices, plan.parallel)
        found.append({**json.loads(dumps(plan.spec)), "folder": str(folder), "shared": shared})
        raise UsageError("asked for")

    monkeypatch.setattr(Training, "run", instead)
    return found


def test_train_without_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["train", "standard", *SHORT]) == 0
    out = capsys.readouterr().out
    (folder,) = Path("runs").iterdir()
    assert folder.name.startswith("standard-")
    assert "\x1b" not in out
    assert "of 359 images of digits:test" in out
    assert out.splitlines()[-1] == f"next       robustkit evaluate {folder}/ --data digits:test"
    assert f"report     {folder}/report.html" in out
    names = {file.name for file in folder.iterdir()}
    assert names >= {"spec.json", "model.safetensors", "model.json", "metrics.jsonl", "checkpoint.pt"}
    assert run(["train", "standard", *SHORT]) == 0
    again = capsys.readouterr()
    assert again.out == out
    assert "is finished" in again.err
    assert run(["train", "standard", *SHORT, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((folder / "model.json").read_text())
    assert run([*out.splitlines()[-1].split()[2:], "--limit", "8", "--suite", "fgsm"]) == 0
    capsys.readouterr()
    for verb in ("transfer", "verify"):
        assert run([verb, str(folder)]) == 2
        assert "holds a trained model" in capsys.readouterr().err
    whole = (folder / "report.html").read_text()
    assert run(["report", str(folder)]) == 0
    assert "of 359 images of digits:test" in capsys.readouterr().out
    assert (folder / "report.html").read_text() == whole
    assert run(["report", str(folder), "--png", "card.png"]) == 2
    assert "is no evaluation" in capsys.readouterr().err
    # While it goes on, the page has what there is so far.
    (folder / "model.json").unlink()
    assert run(["report", str(folder)]) == 0
    assert "3 of 3 epochs" in capsys.readouterr().out
    assert "Not finished" in (folder / "report.html").read_text()


def test_every_flag_reaches_the_spec(specs: list[dict[str, Any]]) -> None:
    words = [word for pair in FLAGS.items() for word in pair]
    run(["train", "standard", *words, "--devices", "2", "--parallel", "members", "--out", "there"])
    (spec,) = specs
    assert spec["data"]["n"] == 40
    assert spec["arch"]["string"].startswith("robustkit:cifar-resnet20?")
    assert spec["test"]["string"] == "digits:test"
    expected = {"epochs": 7, "batch_size": 8, "lr": 0.025, "members": 3, "ema": 0.5, "seed": 5}
    assert {name: spec[name] for name in expected} == expected
    assert (spec["augment"], spec["precision"], spec["folder"]) == ("crop", "bf16", "there")
    assert spec["shared"] == (2, "members")


def test_the_page_has_the_command_that_trains_it_again(specs: list[dict[str, Any]]) -> None:
    words = [word for pair in FLAGS.items() for word in pair]
    alone = ["--members", "1", "--ema", "0", "--samples-per-cycle", "1", "--cycles", "7"]
    for method, fields in (("dverge", ["--random-start", "true"]), ("csgld", alone)):
        specs.clear()
        run(["train", method, *words, *fields])
        first = {name: value for name, value in specs[0].items() if name not in ("folder", "shared")}
        run(shlex.split(command(TrainSpec(**first)))[1:])
        assert {**specs[1], **first} == specs[1]


def test_the_help_describes_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    """The whole docstring of the method, which has the words that a field may be."""
    assert run(["train", "dverge", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "`layer` is a number, a module's name, or `random`, drawn for each `epoch`, `batch` or `member`" in text
    assert "`train`, `frozen` or `separate`" in text
    assert run(["train", "multires", "--help"]) == 0
    assert "`preset` is `notebook` or `paper`" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", sorted(registry.catalog("method")))
def test_every_field_of_a_method_is_a_flag(
    name: str, specs: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """One by one, each at another value than its default."""
    assert run(["train", name, "--help"]) == 0
    text = capsys.readouterr().out
    # All that its docstring says, not the first line alone.
    compact = re.sub(r"\s+", "", text)
    assert re.sub(r"\s+", "", registry.catalog("method")[name].detail) in compact
    value = make_method(name)
    shared = {"data", "test", "arch", "limit", "epochs", "batch_size", "lr", "members", "ema", "augment", "seed"}
    shared |= {"precision", "device", "devices", "parallel", "out", "data_root", "download", "json", "debug"}
    shared |= {"overwrite", "trust_code"}
    for field in registry.catalog("method")[name].fields:
        assert field.name not in shared
        flag = f"--{field.name.replace('_', '-')}"
        assert flag in text
        default = getattr(value, field.name)
        if isinstance(default, str):
            continue  # words are checked by the method; what follows shows that numbers arrive
        if isinstance(default, StepSize):
            changed: Any = "0.01px"
        elif isinstance(default, bool):
            changed = not default
        elif isinstance(default, int):
            changed = max(default - 1, 1)
        else:
            changed = default * 0.5 if default else 0.25
        run(["train", name, flag, str(changed), "--limit", "48", "--epochs", "60", "--batch-size", "16"])
        err = capsys.readouterr().err
        if specs:
            assert specs.pop()["method"][field.name] == changed
        else:
            # The method found it too much for so short a run.
            assert err.startswith(f"error: {name}: ")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["standart"], "Did you mean 'standard'"),
        (["standard", "--momentum", "much"], "momentum='much' must be a number"),
        (["standard", "--epoch", "3"], "--epoch"),
        (["standard", "--data", "digit:train"], "Did you mean 'digits'"),
        (["standard", "--data", "nowhere.npz"], "nowhere.npz"),
        (["standard", "--arch", "robustkit:digits-cn"], "Did you mean 'digits-cnn'"),
        (["standard", "--batch-size", "many"], "--batch-size must be a whole number, or auto, got 'many'."),
        (["standard", "--device", "tpu"], "device 'tpu'"),
        (["standard", "--momentum", "-1"], "momentum=-1 must be at least 0 and below 1"),
        (["standard", "--weight-decay", "-1"], "weight_decay=-1 must be at least 0"),
        (["standard", "--warmup", "-1"], "warmup=-1 must be from 0 to 1"),
        (["lgv", "--snapshots-per-epoch", "0"], "snapshots_per_epoch=0 must be at least 1"),
        (["csgld", "--cycles", "0"], "cycles=0 must be at least 1"),
        (["csgld", "--cycles", "7", "--epochs", "8"], "8 epochs cannot be divided into 7 equal cycles"),
    ],
)
def test_bad_input_is_one_sentence(
    words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["train", *words]) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_killed_training_resumes(tmp_path: Path) -> None:
    """Killed while it trains, and once more after it has gone on; the posterior is that of a run in one piece."""
    fields = ["--cycles", "2", "--samples-per-cycle", "2", "--noise-epochs", "1"]
    words = ["train", "csgld", *fields, "--epochs", "20", "--limit", "192", "--batch-size", "32"]
    command = [sys.executable, "-m", "robustkit", *words, "--test", "digits:test", "--out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    cut = tmp_path / "cut"
    seen = 0
    for _ in range(2):
        process = subprocess.Popen([*command, str(cut)], env=environment, stderr=subprocess.PIPE)
        lines = cut / "metrics.jsonl"
        while process.poll() is None and (not lines.is_file() or lines.read_text().count("\n") < seen + 3):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        seen = lines.read_text().count("\n")
    assert 6 <= seen < 20
    assert not (cut / "model.json").exists()
    for folder in (cut, tmp_path / "whole"):
        done = subprocess.run([*command, str(folder)], env=environment, capture_output=True, text=True, check=True)
        assert ("resuming" in done.stderr) == (folder == cut)
    for name in ("posterior.safetensors", "spec.json"):
        assert (cut / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
