"""The reproduction script from end to end, small: the shape of its tables, and resuming."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "reproductions" / "reproduce_bayesian.py"
SMALL = "--scale digits --nets 2 --cycles 2 --epochs 4 --images 40 --steps 6 --temperatures 0 0.01 --device cpu"


@pytest.mark.slow
def test_the_tables_of_digits_are_complete_and_a_run_resumes(tmp_path: Path) -> None:
    def run() -> tuple[str, str]:
        command = [sys.executable, str(SCRIPT), *SMALL.split(), "--out", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout, done.stderr

    out, _ = run()
    titles = [line for line in out.splitlines() if "success on" in line or "T-DEE on" in line]
    # Main and T-DEE, attacks, iterations, cycles, techniques, weakness, temperatures; on two targets.
    assert len(titles) == 2 * 8
    for row in (
        "1 net ",
        "2 nets",
        "cSGLD, 1 sample ",
        "cSGLD, 6 samples",
        "I-FGSM, light",
        "light-CWA",
        "temperature 0.01",
    ):
        assert row in out
    assert "nan" not in out
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    again, _ = run()
    assert again == out
    assert files == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
