"""Every verb on a simulated GPU: no tensor on the wrong device, and the results of the CPU."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated_gpu import simulated_gpu

import robustkit
from robustkit import cli

NET = "robustkit:digits-cnn"
OTHER = f"'{NET}?defense=bit-depth'"
MEMBERS = f"'ensemble:[{NET};{NET}?defense=bit-depth]?combine=median'"
DATA = "--data digits:test --limit 3"
LINF, FP32 = "--threat linf:0.15", "--precision fp32"
GRADIENT = "'pgd(steps=2,restarts=2),race(steps=2),apgd-t(steps=2,targets=2),mora(steps=2)'"
OTHERS = "'fab(steps=2),square(queries=4)'"
OFFICIAL = "'autoattack:apgd-ce(steps=2),autoattack:square(queries=3)'"
ARMS = "'pgd(steps=2),apgd(steps=4)*,apgd-t(steps=3)*,fab-t(steps=3)*,square(queries=20)*'"
TRAIN = f"{FP32} --limit 40 --batch-size 20 --out run"
# Commands that are run one after another in one folder.
COMMANDS = {
    "evaluate curve, verify": [
        f"evaluate {NET} {DATA} {LINF} {FP32} --suite 'pgd(steps=2)' --curve --out run",
        "verify run",
    ],
    "evaluate gradient": [f"evaluate {NET} {DATA} {LINF} {FP32} --suite {GRADIENT}"],
    "evaluate others": [f"evaluate {NET} {DATA} {LINF} {FP32} --suite {OTHERS}"],
    "evaluate official": [f"evaluate {NET} {DATA} {LINF} {FP32} --suite {OFFICIAL}"],
    "evaluate arms": [f"evaluate {NET} {DATA} {LINF} {FP32} --suite {ARMS}"],
    "evaluate l1": [f"evaluate {NET} {DATA} --threat l1:1 {FP32} --suite 'apgd(steps=2)',{OTHERS}"],
    "evaluate l2": [f"evaluate {NET} {DATA} --threat l2:0.3 {FP32} --suite {GRADIENT},{OTHERS}"],
    "evaluate rapid": [f"evaluate {NET} {DATA} --threat linf:0.3 {FP32} --suite rapid"],
    "evaluate ensemble": [f"evaluate {MEMBERS} {DATA} --threat linf:0.3 {FP32} --suite auto"],
    "plan": [f"plan {NET} {DATA} {LINF} {FP32} --suite 'pgd(steps=2)'"],
    "craft": [f"craft --surrogate {NET} --surrogate {OTHER} --target {NET} {DATA} {LINF} --attack 'cwa(steps=2)'"],
    "craft budgets": [f"craft --surrogate {NET} --target {OTHER} {DATA} {LINF} --attack mi-fgsm --budgets 2,4"],
    "matrix": [f"matrix --models {NET} --models {OTHER} {DATA} {LINF} --attack 'mi-fgsm(steps=2)'"],
    "doctor": [f"doctor {NET} {DATA} {LINF}"],
    "doctor of the machine": ["doctor"],
    "corrupt": [f"corrupt {NET} {DATA} --severities 1"],
    "train standard": [f"train standard {TRAIN} --epochs 1"],
    "train csgld": [f"train csgld {TRAIN} --epochs 3 --cycles 1 --noise-epochs 1"],
    "train multires": [f"train multires {TRAIN} --epochs 2"],
    "train dverge": [f"train dverge {TRAIN} --epochs 1"],
    "diversity": [f"diversity {MEMBERS} {DATA} {LINF} --steps 2 --restarts 1"],
}
FAST = {"evaluate gradient", "evaluate official", "craft", "doctor", "train dverge"}
# What differs between two runs or devices: times, what is chosen by them, and the passes that measure them.
VOLATILE = {
    *("cost", "environment", "files", "forwards", "backwards", "memory", "scales", "seconds", "speed", "speeds"),
    *("images_per_second", "propagations"),
}


def result(command: str, device: str, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command in the folder of the test and return what it prints."""
    words = [*shlex.split(command), "--device", device]
    if words[0] != "verify":
        words.append("--json")
    code = cli.run(words)
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out if words[0] == "verify" else json.loads(captured.out)


def assert_same(found: Any, expected: Any, path: str = "") -> None:
    """Assert that two results are equal, apart from VOLATILE fields and the rounding of numbers."""
    if isinstance(expected, Mapping):
        assert found.keys() == expected.keys(), path
        for name in expected.keys() - VOLATILE:
            assert_same(found[name], expected[name], f"{path}.{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), path
        for number, pair in enumerate(zip(found, expected, strict=True)):
            assert_same(*pair, f"{path}[{number}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4), path
    else:
        assert found == expected, path


def cases() -> list[Any]:
    """Return the parameters of the test; some are slow."""
    return [
        pytest.param(words, id=name, marks=[] if name in FAST else pytest.mark.slow)
        for name, words in COMMANDS.items()
    ]


@pytest.mark.parametrize("commands", cases())
def test_a_verb_gives_the_result_of_the_cpu(
    commands: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = []
    for device, place in (("cpu", nullcontext()), ("cuda", simulated_gpu())):
        folder = tmp_path / device
        folder.mkdir()
        monkeypatch.chdir(folder)
        with place:
            results.append([result(command, device, capsys) for command in commands])
    assert_same(results[1], results[0])


def test_minimum_norms_are_those_of_the_cpu() -> None:
    model, data = robustkit.load_model(NET), robustkit.load_data("digits:test").head(3)
    expected = robustkit.minimum_norm(model, data, attack="fmn(steps=4)", device="cpu")
    with simulated_gpu():
        found = robustkit.minimum_norm(model, data, attack="fmn(steps=4)", device="cuda")
    torch.testing.assert_close(found.distance.cpu(), expected.distance)
