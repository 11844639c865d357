"""Option values without a meaning: one sentence and exit code 2 before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from robustkit.cli import run
from robustkit.core.devices import pick_device
from robustkit.core.errors import UsageError

SMALL = ("evaluate", "--limit", "4", "--suite", "fgsm")
TRAIN = ("train", "standard", "--limit", "64")
LONG, DIGITS = "x" * 300, "9" * 5000
NO_USER = "begins with ~ and no user's name"
CASES: list[tuple[tuple[str, ...], str]] = [
    (("evaluate", ""), "an argument is ''"),
    (("evaluate", "a\0b"), "NUL character"),
    ((*SMALL, "--threat", " "), "--threat is ' '"),
    ((*SMALL, "--threat="), "--threat is ''"),
    ((*SMALL, "--out", ""), "--out is ''"),
    ((*SMALL, "--out", LONG), "none that a file can have"),
    ((*SMALL, "--out=~nobody-of-this-name/x"), NO_USER),
    ((*SMALL, "--out", "file.txt"), "file.txt"),
    (("evaluate", "--limit", DIGITS), "--limit must be a whole number, got"),
    ((*SMALL, "--seed", str(2**64)), "--seed"),
    ((*SMALL, "--workers", "0"), "--workers"),
    ((*SMALL, "--workers", str(10**9)), "--workers"),
    ((*SMALL, "--fail-under", "nan"), "--fail-under must be a finite number, got nan."),
    ((*SMALL, "--fail-under", "45"), "--fail-under must be a share from 0 to 1, e.g. 0.45 for 45 %, got 45."),
    ((*SMALL, "--stop-at-width", "inf"), "--stop-at-width must be a finite number, got inf."),
    ((*SMALL, "--time-limit", "nan"), "time"),
    ((*SMALL, "--batch-size", DIGITS), "--batch-size"),
    ((*TRAIN, "--lr", "nan"), "--lr must be a finite number, got nan."),
    ((*TRAIN, "--ema", "2"), "ema"),
    ((*TRAIN, "--warmup", "99"), "warmup"),
    ((*TRAIN, "--members", str(10**8)), "--members"),
    (("plan", "--seconds", "1e999"), "--seconds must be a finite number, got inf."),
    (("craft", "--limit", "4", "--weights", "1e999999999"), "weights"),
    (("doctor", "--aggregator", "vote", "--predictors", str(10**9)), "predictors"),
    (("report", "a\0b"), "NUL character"),
    (("report", LONG), "none that a file can have"),
    (("list", DIGITS), "no list or name"),
    (("evaluate", f"robustkit:digits-cnn@{LONG}", "--data", "digits:test"), "none that a file can have"),
    (("evaluate", f"{LONG}/", "--data", "digits:test"), "none that a file can have"),
    (("evaluate", "~nobody-of-this-name/x/", "--data", "digits:test"), NO_USER),
    (("evaluate", "~nobody-of-this-name/net.py:net", "--data", "digits:test"), NO_USER),
    (
        ("evaluate", "--data", "~nobody-of-this-name/x.npz", "--threat", "linf:0.1"),
        "begins with ~ and no user's name",
    ),
    (("evaluate", "--data", f"{LONG}.npz", "--threat", "linf:0.1"), "none that a file can have"),
    (("evaluate", "--data", f"folder:{LONG}", "--threat", "linf:0.1"), "none that a file can have"),
]


@pytest.mark.parametrize(("command", "words"), CASES, ids=lambda value: " ".join(value)[:40].replace("\0", "NUL"))
def test_meaningless_values_are_refused(
    command: tuple[str, ...],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file.txt").write_text("text")
    code = run(list(command))
    out, err = capfd.readouterr()
    assert (code, out, len(err.splitlines())) == (2, "", 1), err
    assert err.startswith("error: ")
    assert words in err
    assert len(err) < 1000
    assert sorted(path.name for path in Path().iterdir()) == ["file.txt"]


@pytest.mark.parametrize("name", ["meta", "hpu", "cpu:99", "mps", "cuda:77", "xla", "", "gpu", "cpu:-1", LONG])
def test_unusable_devices_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="cannot be used here; write auto"):
        pick_device(name)
