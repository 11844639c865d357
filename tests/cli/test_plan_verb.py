"""`robustkit plan` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from robustkit.cli import run

QUICK = ["plan", "--limit", "16", "--suite", "fgsm", "--seconds", "0.3"]


def test_plan_prints_a_row_for_each_number_of_devices(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run([*QUICK, "--devices", "4,1", "--price", "2.5"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("plan   16 images of digits:test   linf:0.15   fgsm   seed 0")
    rows = [line.split() for line in text.splitlines()]
    assert [row[0] for row in rows if row and row[0] in ("1", "4")][:2] == ["1", "4"]
    assert all(len(line) <= 80 for line in text.splitlines() if "%" in line or "cost" in line)
    assert text.rstrip().endswith("robustkit evaluate --limit 16 --suite fgsm")
    assert "\x1b" not in text
    assert not list(tmp_path.iterdir())


def test_json_is_the_record(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*QUICK, "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["format"] == 1
    assert [scale["devices"] for scale in body["scales"]] == [1, 8, 64]
    assert body["scales"][0]["money"] is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--devices", "0"], "--devices must be whole numbers of at least 1, e.g. 1,8,64, got '0'."),
        (["--devices", "two"], "--devices must be whole numbers of at least 1, e.g. 1,8,64, got 'two'."),
        (["--price", "-3"], "--price must be at least 0, got -3."),
        (["--seconds", "0"], "--seconds must be above 0, got 0."),
        (["--seconds", "nan"], "--seconds must be a finite number, got nan."),
    ],
)
def test_bad_input_is_one_sentence(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--limit", "4", *flags]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
