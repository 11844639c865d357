"""`craft`, `transfer`, `matrix` and `compare` of craft runs on the command line."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from robustkit import UsageError
from robustkit.cli import run
from robustkit.cli.model_lists import refuse_lists, split_models
from robustkit.reporting.html import craft
from robustkit.runs import craft_record

NETS = str(Path(__file__).parents[1] / "nets.py")
ONE, TWO, THREE, FOUR = (f"{NETS}:small?channels=1&seed={seed}" for seed in (1, 2, 3, 4))
DATA = ["--data", "digits:test", "--limit", "12", "--threat", "linf:0.1"]
TWELVE = f"{NETS}:small?channels=1&classes=12"
SMALL = ["craft", "--surrogate", ONE, "--attack", "i-fgsm(steps=2)", *DATA]


def test_craft_without_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["craft", "--limit", "12"]) == 0
    out = capsys.readouterr().out
    (folder,) = Path("runs").iterdir()
    assert "20 gradients and 20 forwards per image" in out
    assert out.splitlines()[-1].startswith(f"next     robustkit transfer {folder} --target")
    assert max(map(len, out.splitlines()[:-1])) <= 80
    assert {file.name for file in folder.iterdir()} >= {
        *("spec.json", "ledger.sqlite", "adversarial.npz", "transfer.json", "examples.npz", "report.html"),
    }
    with np.load(folder / "adversarial.npz") as arrays:
        assert arrays["x"].shape == (12, 1, 8, 8)
        assert arrays["index"].tolist() == list(range(12))
    assert run(["craft", "--limit", "12"]) == 0
    again = capsys.readouterr()
    assert again.out == out
    assert "finished before" in again.err


def test_every_flag_reaches_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--combine", "loss", "--weights", "1,1/2", "--seed", "7", "--batch-size", "5", "--device", "cpu"]
    more = ["--targeted", "random", "--streaming", "--budgets", "4,8", "--forecast", "--png", "png", "--json"]
    command = ["craft", "--surrogate", ONE, "--surrogate", TWO, "--target", THREE, *flags, *more, *DATA]
    assert run([*command, "--attack", "mi-fgsm(steps=3,step_size=0.1eps,momentum=0.5)", "--out", "r"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(Path("r/transfer.json").read_text())
    spec = json.loads(Path("r/spec.json").read_text())
    assert printed["spec"] == spec
    assert [one["string"] for one in spec["surrogates"]] == [ONE, TWO]
    assert (spec["combine"], spec["weights"], spec["seed"], spec["verb"]) == ("loss", [1.0, 0.5], 7, "craft")
    assert (spec["threat"], spec["targeted"], spec["data"]["n"]) == ("linf:0.1", "random", 12)
    assert spec["attack"] == {
        "string": "mi-fgsm(steps=3,step_size=0.1eps,momentum=0.5)",
        "name": "mi-fgsm",
        "steps": 3,
        "step_size": 0.1,
        "momentum": 0.5,
        "loss": "ce",
        "techniques": [],
    }
    assert printed["environment"]["images_at_once"] == 5
    assert (printed["environment"]["loaded"], printed["environment"]["device"]) == (False, "cpu")
    assert [point["budget"] for point in printed["budgets"]] == [4, 8]
    assert len(printed["forecast"]["images"]) == 12
    assert len(list(Path("png").glob("*.png"))) == 12
    with Image.open("png/000003.png") as file, np.load("r/adversarial.npz") as arrays:
        assert np.abs(np.asarray(file) - 255 * arrays["x"][3, 0]).max() < 1
    # The page's command asks for the same run.
    words = shlex.split(craft.command(craft_record.Craft.from_json(printed)))[1:]
    capsys.readouterr()
    assert run([*words, "--device", "cpu", "--batch-size", "5", "--streaming", "--out", "r"]) == 0
    assert "was finished before" in capsys.readouterr().err
    # a target that comes later has no part in budgets and files yet; the same command with it adds the rest
    assert run(["transfer", "r", "--target", FOUR]) == 0
    assert rates("r") == [1, 1]
    command = [word for word in command if word not in ("--json", "--forecast")]
    assert (
        run(
            [
                *command,
                "--target",
                FOUR,
                "--attack",
                "mi-fgsm(steps=3,step_size=0.1eps,momentum=0.5)",
                "--out",
                "r",
            ]
        )
        == 0
    )
    assert "forecast for unseen models" in capsys.readouterr().out
    assert rates("r") == [2, 2]


@pytest.mark.slow
def test_transfer_adds_targets_and_compare_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run([*SMALL, "--out", "a", "--target", TWO]) == 0
    assert run([*SMALL, "--attack", "mi-fgsm", "--out", "b"]) == 0
    images = Path("b/adversarial.npz").read_bytes()
    assert run(["transfer", "b", "--target", TWO, "--target", THREE]) == 0
    assert Path("b/adversarial.npz").read_bytes() == images
    assert len(json.loads(Path("b/transfer.json").read_text())["targets"]) == 2
    capsys.readouterr()
    assert run(["transfer", "b"]) == 0
    assert "targets" in capsys.readouterr().out
    assert run(["compare", "a", "b"]) == 0
    out = capsys.readouterr().out
    assert "the gradients per image differ: 2 for A, 10 for B" in out
    assert "McNemar p" in out
    assert "…" not in out
    assert run(["compare", "a", "b", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["model"] for one in found["targets"]] == [TWO]
    # the page has who judged later, and is made again from the folder alone
    whole = Path("b/report.html").read_text()
    assert whole.count("surrogate: no transfer") == 1
    assert whole.count("data:image/png;base64,") == 3 * 12
    assert run(["report", "b", "--html", "page.html"]) == 0
    assert Path("page.html").read_text() == whole
    # without the images to show it has none, and other verbs say what this folder is
    Path("b/examples.npz").unlink()
    capsys.readouterr()
    assert run(["report", "b"]) == 0
    assert "targets" in capsys.readouterr().out
    assert "data:image" not in Path("b/report.html").read_text()
    assert run(["verify", "a"]) == 2
    assert "robustkit report a" in capsys.readouterr().err
    assert run(["transfer", "a", "--target", TWO, "--data", "digits:train"]) == 2
    assert "is not the data" in capsys.readouterr().err
    # as in crafting, whoever knows other classes is no target
    assert run(["transfer", "b", "--target", TWELVE]) == 2
    assert "has 12 classes, the surrogates have 10" in capsys.readouterr().err
    assert len(json.loads(Path("b/transfer.json").read_text())["targets"]) == 2


def test_matrix_and_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["matrix", "--models", f"{ONE},{TWO}", "--target", THREE, "--attack", "i-fgsm(steps=2)", *DATA]
    assert run([*command, "--out", "m"]) == 0
    out = capsys.readouterr().out
    assert "crafted on" in out
    assert "m/matrix.html" in out
    record = json.loads(Path("m/matrix.json").read_text())
    assert [len(row) for row in record["success"]] == [3, 3]
    assert record["gradients_per_image"] == [2, 2]
    cell = json.loads((Path("m") / record["folders"][0] / "transfer.json").read_text())["targets"][2]
    assert record["success"][0][2]["value"] == cell["success"]
    rows = [json.loads((Path("m") / name / "transfer.json").read_text()) for name in record["folders"]]
    sets = [craft_record.Craft.from_json(row).targets[2].fooled(row["labels"], None) for row in rows]
    assert record["worst"][2]["value"] == craft_record.worst(sets).value >= record["success"][1][2]["value"]
    assert record["worst"][0] == record["success"][1][0]
    text = Path("m/matrix.html").read_text()
    assert "http" not in text.replace("http-equiv", "")
    assert run([*command, "--out", "m"]) == 0
    assert capsys.readouterr().out == out
    Path("m/matrix.html").unlink()
    assert run(["report", "m"]) == 0
    assert "crafted on" in capsys.readouterr().out
    assert Path("m/matrix.html").read_text() == text


def test_model_lists_are_split_at_commas_between_models() -> None:
    assert split_models("a:b?mean=0.5,0.5,0.5&std=1,1,1,timm:c,d:e@/f.pt") == [
        "a:b?mean=0.5,0.5,0.5&std=1,1,1",
        "timm:c",
        "d:e@/f.pt",
    ]
    assert split_models("ensemble:[a:b?std=1,1,1;c:d]?combine=vote,e:f") == [
        "ensemble:[a:b?std=1,1,1;c:d]?combine=vote",
        "e:f",
    ]


def test_a_list_in_a_flag_for_one_model_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a,b.py"
    file.write_text("")
    refuse_lists("--target", [f"{file}:net?mean=0.1,0.2,0.3", "timm:a?std=1,1,1", "ensemble:[a:b,c;d:e]"])
    for text in (
        "timm:a,timm:b",
        "robustkit:digits-cnn@w.safetensors,timm:b",
        "runs/p/,./net.py:f",
        f"{ONE},{TWO}",
    ):
        with pytest.raises(UsageError, match=r"is a list; repeat the flag for each model: --target .* --t"):
            refuse_lists("--target", [text])


@pytest.mark.slow
def test_a_killed_craft_run_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["craft", "--data", "digits:test", "--limit", "40", "--attack", "mi-fgsm(steps=40)"]
    command += ["--batch-size", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "robustkit", *command, "--out", "r"],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    for _ in range(3000):
        time.sleep(0.02)
        if done(Path("r/ledger.sqlite")) >= 2:
            break
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 2 <= done(Path("r/ledger.sqlite")) < 20
    assert run([*command, "--out", "r"]) == 0
    assert "of 40 images done" in capsys.readouterr().err
    assert run([*command, "--out", "w"]) == 0
    records = [json.loads((Path(place) / "transfer.json").read_text()) for place in "rw"]
    assert records[0]["gradients_per_image"] == records[1]["gradients_per_image"] == 40
    # Another process may find another memory layout faster, and that rounds otherwise; a run keeps to its own.
    if records[0]["environment"]["ways"] == records[1]["environment"]["ways"]:
        assert Path("r/adversarial.npz").read_bytes() == Path("w/adversarial.npz").read_bytes()


def rates(folder: str) -> list[int]:
    record = json.loads((Path(folder) / "transfer.json").read_text())
    return [len(point["success"]) for point in record["budgets"]]


def done(ledger: Path) -> int:
    try:
        with closing(sqlite3.connect(f"{ledger.absolute().as_uri()}?mode=ro", uri=True)) as database:
            return int(database.execute("SELECT count(*) FROM chunks").fetchone()[0])
    except sqlite3.OperationalError:  # not there yet, or being made
        return 0
