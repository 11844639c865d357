"""`verify` finds every changed byte and raises no false alarm."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from nets import Small, labelled

from robustkit import RunError, UsageError, evaluate, load_model, verify
from robustkit.cli import run
from robustkit.runs import run_folder
from robustkit.runs.evaluation_record import Report

SHAPE = (3, 6, 8)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the command line on real digits, weights in a file of their own."""
    place = tmp_path_factory.mktemp("runs")
    weights = Path(load_model("robustkit:digits-cnn").string.partition("@")[2] or _packaged())
    shutil.copy(weights, place / "w.safetensors")
    command = [f"robustkit:digits-cnn@{place / 'w.safetensors'}", "--data", "digits:test", "--limit", "24"]
    more = ["--threat", "linf:0.25", "--suite", "pgd(steps=5)", "--out", str(place / "r"), "--batch-size", "9"]
    assert run(["evaluate", *command, *more]) == 0
    return place


def _packaged() -> str:
    from importlib.resources import files

    return str(files("robustkit") / "weights" / "digits-cnn.safetensors")


def flip(file: Path, offset: int) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= 1 << (offset % 8)
    file.write_bytes(content)


def found_by_verify(path: Path) -> bool:
    try:
        return bool(verify(path).bad)
    except UsageError:
        return True


def test_an_unchanged_run_verifies(finished: Path) -> None:
    result = verify(finished / "r")
    assert result.bad == []
    assert result.checked == sum(not v.robust and v.attack != "clean" for v in result.report.verdicts) > 3


@pytest.mark.parametrize("name", ["adversarial.npz", "ledger.sqlite", "spec.json"])
def test_a_changed_byte_in_any_file_is_found(name: str, finished: Path, tmp_path: Path) -> None:
    size = (finished / "r" / name).stat().st_size
    places = [0, size - 1, *random.Random(0).sample(range(size), 12)]
    for offset in places:
        copy = tmp_path / f"r{offset}"
        shutil.copytree(finished / "r", copy)
        flip(copy / name, offset)
        assert found_by_verify(copy), f"byte {offset} of {name}"


def test_a_changed_byte_is_found_when_the_run_is_resumed(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = json.loads((finished / "r" / "spec.json").read_text())
    command = [
        "evaluate",
        spec["model"]["string"],
        "--data",
        "digits:test",
        "--limit",
        "24",
        "--threat",
        "linf:0.25",
    ]
    command += ["--suite", "pgd(steps=5)", "--batch-size", "9"]
    for name in ("adversarial.npz", "ledger.sqlite"):
        copy = tmp_path / name
        shutil.copytree(finished / "r", copy)
        flip(copy / name, (copy / name).stat().st_size // 2)
        assert run([*command, "--out", str(copy)]) == 3
        assert f"{name} has changed since the run" in capsys.readouterr().err


def test_changed_weights_are_found(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(finished, tmp_path / "all")
    weights = tmp_path / "all" / "w.safetensors"
    flip(weights, weights.stat().st_size - 1001)
    moved = ["--model", f"robustkit:digits-cnn@{weights}"]
    assert run(["verify", str(tmp_path / "all" / "r"), *moved]) == 1
    assert "its weights or code have changed since the run" in capsys.readouterr().out
    again = ["evaluate", f"robustkit:digits-cnn@{weights}", "--data", "digits:test", "--limit", "24"]
    more = ["--threat", "linf:0.25", "--suite", "pgd(steps=5)", "--out", str(tmp_path / "all" / "r")]
    assert run([*again, *more]) == 2
    assert "differs in model" in capsys.readouterr().err


def test_weights_in_another_folder_verify(finished: Path, tmp_path: Path) -> None:
    shutil.copy(finished / "w.safetensors", tmp_path / "elsewhere.safetensors")
    model = f"robustkit:digits-cnn@{tmp_path / 'elsewhere.safetensors'}"
    assert run(["verify", str(finished / "r"), "--model", model]) == 0


def rewritten(path: Path, change: object) -> Path:
    """Change adversarial.npz and report.json's seal of it: a forger who knows the seals."""
    with np.load(path / "adversarial.npz") as stored:
        arrays = dict(stored)
    change(arrays)
    np.savez(path / "adversarial.npz", **arrays)
    body = json.loads((path / "report.json").read_text())
    body["files"]["adversarial.npz"] = run_folder.sha256(path / "adversarial.npz")
    (path / "report.json").write_text(json.dumps(body))
    return path


FORGERIES = {
    "outside the ball": (lambda a: a["x"].__setitem__(0, 1 - a["x"][0]), "outside the threat linf"),
    "outside the box": (lambda a: a["x"].__setitem__((0, 0, 0, 0), -1e-3), "outside the threat linf"),
    "NaN": (lambda a: a["x"].__setitem__((0, 0, 0, 0), np.nan), "outside the threat linf"),
    "label": (lambda a: a["y"].__setitem__(0, (a["y"][0] + 1) % 10), "label"),
    "index": (lambda a: a["index"].__setitem__(0, 10**6), "no such image"),
    "row dropped": (lambda a: a.update({k: v[1:] for k, v in a.items()}), "has no image of it"),
    "other size": (lambda a: a.update(x=a["x"][:, :, :4]), "images of"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_records_are_named(
    forgery: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, words = FORGERIES[forgery]
    shutil.copytree(finished / "r", tmp_path / "r")
    path = rewritten(tmp_path / "r", change)
    assert run(["verify", str(path)]) == 1
    out = capsys.readouterr().out
    assert words in out
    assert "bad" in out


def test_clean_images_do_not_pass_as_adversarials(finished: Path, tmp_path: Path) -> None:
    from robustkit import load_data

    def clean(arrays: dict[str, np.ndarray]) -> None:
        arrays["x"] = load_data("digits:test").images(arrays["index"]).numpy()

    shutil.copytree(finished / "r", tmp_path / "r")
    bad = verify(rewritten(tmp_path / "r", clean)).bad
    assert all("does not fool the model" in sentence for sentence in bad)
    assert len(bad) == len(np.load(finished / "r" / "adversarial.npz")["index"])


def test_a_forged_report_is_found(finished: Path, tmp_path: Path) -> None:
    for number, change in enumerate(
        [
            lambda body: body["verdicts"][0].update(robust=not body["verdicts"][0]["robust"]),
            lambda body: body["robust_accuracy"].update(value=0.99),
            lambda body: body["stages"][1].update(fooled=0),
            lambda body: body["spec"].update(seed=3),
            lambda body: body["cost"].update(forwards=1),
        ]
    ):
        copy = tmp_path / str(number)
        shutil.copytree(finished / "r", copy)
        body = json.loads((copy / "report.json").read_text())
        change(body)
        (copy / "report.json").write_text(json.dumps(body))
        assert verify(copy).bad


def test_verdicts_within_rounding_of_the_boundary_verify(tmp_path: Path) -> None:
    """A margin within float noise is listed, whichever side of 0 it is on when looked at again."""
    net = Small()
    x, y = labelled(net, 12, SHAPE)
    evaluate(net, x, y, "linf:0.05", suite="pgd(steps=5)", out=tmp_path / "r")

    class Noisy(torch.nn.Module):
        """The same net, all logits equal but for noise."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 100 + 1e-5 * net(x).sign()

    result = verify(tmp_path / "r", Noisy(), x, y)
    assert len(result.borderline) == result.checked > 0
    assert all("weights or code have changed" in sentence for sentence in result.bad)


def test_python_runs_are_verified_from_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = Small()
    x, y = labelled(net, 12, SHAPE)
    evaluate(net, x, y, "linf:0.05", suite="pgd(steps=5)", out=tmp_path / "r")
    assert verify(tmp_path / "r", net, x, y).bad == []
    with pytest.raises(UsageError, match="made from Python"):
        verify(tmp_path / "r")
    assert run(["verify", str(tmp_path / "r")]) == 2
    assert verify(tmp_path / "r", net, x.flip(0), y).bad


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    net = Small()
    x, y = labelled(net, 12, SHAPE)
    evaluate(net, x, y, "linf:0.05", suite="fgsm", out=tmp_path / "r")
    (tmp_path / "r" / "report.json").unlink()
    with pytest.raises(UsageError, match="is not finished; run its command again"):
        verify(tmp_path / "r")


def test_changed_data_stops_a_resumed_run(tmp_path: Path) -> None:
    """Files that are read lazily are identified by name and size; their bytes are checked as they are used."""
    from robustkit.data import from_arrays
    from robustkit.engine.progress import Progress

    class Stop(Progress):
        def stage(self, name: str, images: int, robust: int, n: int) -> None:
            if name == "pgd":
                raise KeyboardInterrupt

    net = Small()
    x, y = labelled(net, 12, SHAPE)
    samples = from_arrays(x, y)
    with pytest.raises(KeyboardInterrupt):
        evaluate(net, samples, None, "linf:0.05", suite="pgd(steps=5)", out=tmp_path / "r", progress=Stop())
    assert samples.fingerprint  # kept from before the change
    samples.source.read(np.array([0]))
    changed = x.clone()
    changed[4, 0, 0, 0] = 1 - changed[4, 0, 0, 0]
    object.__setattr__(samples, "source", from_arrays(changed, y).source)
    with pytest.raises(RunError, match="image 4 of python:arrays has changed since this run's clean pass"):
        evaluate(net, samples, None, "linf:0.05", suite="pgd(steps=5)", out=tmp_path / "r")


def test_the_report_round_trips_through_json(finished: Path) -> None:
    report = run_folder.read_report(finished / "r")
    assert Report.from_json(report.to_json()) == report
