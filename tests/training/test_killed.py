"""kill -9 in the middle of an epoch, then the same command: the same weights."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from robustkit.cli import run

CODE = """
import sys
from robustkit.cli import run
from robustkit.training import loop

loop.SAVE_EVERY = 0.0
sys.exit(run(sys.argv[1:]))
"""
SIZE = ["--limit", "240", "--epochs", "2", "--batch-size", "8", "--members", "2", "--baseline", "0"]
STEPS = 30


def steps_done(out: Path) -> int:
    path = out / "checkpoint.pt"
    return int(torch.load(path, weights_only=True)["step"]) if path.is_file() else 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dverge", "fasten"])
def test_a_run_killed_within_an_epoch_resumes_to_the_same_weights(method: str, tmp_path: Path) -> None:
    killed = ["train", method, *SIZE, "--out", str(tmp_path / "killed")]
    process = subprocess.Popen([sys.executable, "-c", CODE, *killed], stdout=subprocess.DEVNULL)
    while process.poll() is None and steps_done(tmp_path / "killed") < STEPS + 3:
        time.sleep(0.1)
    process.kill()
    process.wait()
    reached = steps_done(tmp_path / "killed")
    assert STEPS < reached < 2 * STEPS
    assert run(killed) == 0
    assert run(["train", method, *SIZE, "--out", str(tmp_path / "whole")]) == 0
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert one == two
