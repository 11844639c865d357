"""kill -9 in the middle of an epoch, and the same command again: the same weights."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from robustkit.engine.folder import sha256

CODE = """
import sys
from robustkit.cli import run
from robustkit.training import loop

loop.SAVE_EVERY = 0.0
sys.exit(run(sys.argv[1:]))
"""
STEPS = 6


def command(method: str, out: Path) -> list[str]:
    words = ["train", method, "--limit", "96", "--epochs", "8", "--batch-size", "16", "--members", "2"]
    return [sys.executable, "-c", CODE, *words, "--baseline", "0.2", "--out", str(out)]


def steps_done(out: Path) -> int:
    path = out / "checkpoint.pt"
    return int(torch.load(path, weights_only=True)["step"]) if path.is_file() else 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dverge", "fasten"])
def test_killed_within_an_epoch_it_ends_in_the_same_weights(method: str, tmp_path: Path) -> None:
    subprocess.run(command(method, tmp_path / "whole"), check=True, capture_output=True)
    reached, within = 0, 0
    for _ in range(3):
        process = subprocess.Popen(
            command(method, tmp_path / "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and steps_done(tmp_path / "killed") < reached + 4:
            time.sleep(0.02)
        process.kill()
        process.wait()
        reached = steps_done(tmp_path / "killed")
        within += reached % STEPS != 0
    assert within
    subprocess.run(command(method, tmp_path / "killed"), check=True, capture_output=True)
    one, two = (sha256(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert one == two
