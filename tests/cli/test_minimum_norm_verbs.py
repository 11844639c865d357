"""Minimum norms on the command line: run, verify, compare, export, page and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from robustkit.cli import run

SMALL = ["evaluate", "--limit", "5", "--threat", "l2:min", "--suite"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_minimum_norm_run_is_verified_compared_and_exported(capsys: pytest.CaptureFixture[str]) -> None:
    for name, suite in (("a", "ddn(steps=8)"), ("b", "fmn(steps=8)")):
        assert run([*SMALL, suite, "--out", name]) == 0
    out = capsys.readouterr().out
    assert "minimum norm" in out
    assert "95 % interval of the median" in out
    record = json.loads(Path("a/report.json").read_text())
    assert len(record["minimum"]["distances"]) == 5
    assert "Minimum norms: robustkit:digits-cnn" in Path("a/report.html").read_text()
    assert run(["verify", "a"]) == 0
    assert "0 borderline\nmedian distance" in capsys.readouterr().out
    assert run(["compare", "a", "b", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["a_farther"] + found["b_farther"] + found["equal"] == found["n"]
    assert run(["export", "a", "--csv", "a.csv"]) == 0
    assert Path("a.csv").read_text().splitlines()[0].endswith("distance,smallest_distance")
    assert run(["report", "a", "--png", "a.png"]) == 2
    assert "a card shows robust accuracy" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["evaluate", "--threat", "l2:min", "--fail-under", "0.3"], "--fail-under compares robust accuracy"),
        (["evaluate", "--threat", "l2:min", "--models", "zoo.txt"], "--models ranks by robust accuracy"),
        (["train", "pgd-at", "--threat", "linf:min"], "threat 'linf:min' is a search for minimum norms"),
        (["craft", "--threat", "l1:min"], "threat 'l1:min' is a search for minimum norms"),
        (["evaluate", "--threat", "l3:min"], "threat 'l3:min': write NORM:EPS"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_are_one_sentence(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {sentence}")
    assert message.count("\n") == 1
