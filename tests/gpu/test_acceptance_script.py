"""The acceptance script runs on a simulated GPU, and records what fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from simulated_gpu import simulated_gpu

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import gpu_acceptance
from gpu_acceptance_sections import SECTIONS, Setup

NAMES = [name for name in SECTIONS if name != "tests"]


def test_every_section_runs_and_one_that_fails_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(setup: Setup) -> object:
        yield {"row": 1}
        raise RuntimeError("<planted>")

    monkeypatch.setitem(SECTIONS, "tests", (failing, 5))
    words = ["--quick", "--out", str(tmp_path), "--only", ",".join(["tests", *NAMES])]
    with simulated_gpu():
        assert gpu_acceptance.main(words) == 1
    record = json.loads((tmp_path / "acceptance.json").read_text())
    planted, *others = record["sections"]
    assert planted["rows"] == [{"row": 1}]
    assert "RuntimeError: <planted>" in planted["error"]
    assert [(section["name"], section["error"]) for section in others] == [(name, None) for name in NAMES]
    assert all(section["rows"] for section in others)
    assert record["environment"]["device_name"] == "simulated GPU"
    page = (tmp_path / "acceptance.html").read_text(encoding="utf-8")
    assert "Failed: tests." in page
    assert "&lt;planted&gt;" in page
    assert all(f"<h2>{name}</h2>" in page for name in NAMES)


def test_budgets_are_at_most_eight_minutes() -> None:
    assert sum(budget for _, budget in SECTIONS.values()) <= 480
