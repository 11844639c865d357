"""The acceptance script runs on a simulated GPU, and records what fails."""

from __future__ import annotations

import json
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
from simulated_gpu import SimulatedGpu, simulated_gpu

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import gpu_acceptance
from gpu_acceptance_sections import SECTIONS
from gpu_acceptance_setup import Setup
from step_costs import step_costs

NAMES = [name for name in SECTIONS if name != "tests"]


count = SimulatedGpu.count


def counted_with_a_warning(self: SimulatedGpu, kind: str) -> None:
    """Count an event, with the warning of torch's sync debug mode."""
    count(self, kind)
    if kind == "sync":
        with suppress(UserWarning):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)


def test_every_section_runs_and_one_that_fails_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(setup: Setup) -> object:
        yield {"row": 1}
        raise RuntimeError("<planted>")

    monkeypatch.setitem(SECTIONS, "tests", (failing, 5))
    monkeypatch.setattr(SimulatedGpu, "count", counted_with_a_warning)
    words = ["--quick", "--out", str(tmp_path), "--only", ",".join(["tests", *NAMES])]
    with simulated_gpu():
        assert gpu_acceptance.main(words) == 1
    record = json.loads((tmp_path / "acceptance.json").read_text())
    planted, *others = record["sections"]
    assert planted["rows"] == [{"row": 1}]
    assert "RuntimeError: <planted>" in planted["error"]
    assert [(section["name"], section["error"]) for section in others] == [(name, None) for name in NAMES]
    assert all(section["rows"] for section in others)
    (syncs,) = others[NAMES.index("syncs")]["rows"]
    assert syncs["syncs per step"] == step_costs("pgd").syncs
    assert record["environment"]["device_name"] == "simulated GPU"
    page = (tmp_path / "acceptance.html").read_text(encoding="utf-8")
    assert "Failed: tests." in page
    assert "&lt;planted&gt;" in page
    assert all(f"<h2>{name}</h2>" in page for name in NAMES)


def test_budgets_are_at_most_eight_minutes() -> None:
    assert sum(budget for _, budget in SECTIONS.values()) <= 480
