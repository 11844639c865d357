"""The reproduction script: DVERGE lowers transfer on digits, every table has all columns, and a run resumes."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "reproductions" / "reproduce_dverge.py"


def run(out: Path, *words: str) -> str:
    command = [sys.executable, str(SCRIPT), "--scale", "digits", "--device", "cpu", "--out", str(out), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_an_image_fooled_at_one_eps_is_fooled_at_larger_ones() -> None:
    """A-P15: a larger eps never raises the accuracy."""
    spec = importlib.util.spec_from_file_location("reproduce_dverge", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    robust = [np.array([True, True, False, True]), np.array([True, False, True, True])]
    assert [rate.value for rate in module.falling(robust)] == [0.75, 0.5]


@pytest.mark.slow
def test_dverge_lowers_transfer_between_members(tmp_path: Path) -> None:
    """By 35 points at least, clean accuracy within 2, no member collapsed; of another seed than the table."""
    words = "--methods baseline DVERGE --tables transfer --seed 1 --steps 20 --restarts 2".split()
    out = run(tmp_path, *words)
    found = re.search(r"by ([+-][\d.]+) points, clean accuracy by ([+-][\d.]+)\.", out)
    assert found is not None
    assert float(found[1]) <= -35
    assert float(found[2]) >= -2
    members = re.search(r"^DVERGE .*?\)\s+([\d.]+) ([\d.]+) ([\d.]+)", out, re.MULTILINE)
    assert members is not None
    assert min(map(float, members.groups())) > 85


@pytest.mark.slow
def test_every_table_shows_all_three_columns_and_a_run_resumes(tmp_path: Path) -> None:
    words = "--methods baseline DVERGE --epochs 8 --images 24 --steps 2 --restarts 1".split()
    out = run(tmp_path, *words)
    heads = [line for line in out.splitlines() if "black box" in line]
    assert len(heads) == 3
    assert all("white box" in line and "aware" in line for line in heads)
    assert "nan" not in out
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    assert run(tmp_path, *words) == out
    assert files == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
