"""The page of a training run: its curves, and what it states where something was not measured."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from robustkit.reporting.charts.lines import Chart, Series, count_marks, log_positions
from robustkit.reporting.html.training import page
from robustkit.reporting.terminal.training import show_history
from robustkit.runs.report_parts import Rate
from robustkit.runs.training_record import Trained, TrainSpec

PART = {"string": "/far/digits:train", "n": 64, "fingerprint": "d" * 64}
SPEC = TrainSpec(
    method={"name": "dverge", "eps": 0.2, "layer": "<b>"},
    arch={"string": "robustkit:digits-cnn?pretrained=false", "fingerprint": "a" * 64},
    data=PART,
    test={**PART, "string": "digits:test"},
    epochs=4,
    batch_size=16,
    lr=0.1,
    members=3,
    ema=0.0,
    augment="none",
    precision="fp32",
    seed=0,
)


def history(**more: float) -> list[dict[str, Any]]:
    facts = {"loss": 1.5, "rate": 0.1, "images_per_second": 9.0, "test_accuracy": 0.5, "test_loss": 0.7, **more}
    return [{"epoch": number, "step": 4 * number, "seconds": 2.0 * number, **facts} for number in (1, 2, 3, 4)]


def record(**more: Any) -> Trained:
    body: dict[str, Any] = {
        "run_id": SPEC.run_id,
        "arch": "robustkit:digits-cnn",
        "mean": None,
        "std": None,
        "classes": 10,
        "method": SPEC.method,
        "data": "digits:train",
        "spec": {},
        "members": 3,
        "history": history(),
        "cost": {"forwards": 1, "backwards": 1, "flops": 2e12, "seconds": 70.0},
        "hashes": {"model.safetensors": "b" * 64},
        "accuracy": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 100},
        "member_accuracy": [0.4, 0.5, 0.6],
    }
    return Trained(**{**body, **more})


def curves(text: str) -> list[tuple[str, str]]:
    return re.findall(r"</svg></svg>(.*?) <b>(.*?)</b>", text)


def test_an_ensembles_page_has_white_box_and_transfer_curves() -> None:
    text = page(SPEC, history(transfer=0.125, white_box=1.0, cosine=0.25, best_member=0.6), record())
    assert curves(text) == [
        ("test accuracy", "50 %"),
        ("best member", "60 %"),
        ("attack on all members", "100 %"),
        ("images crafted on another member", "12.5 %"),
        ("training", "1.5"),
        ("test", "0.7"),
        ("at the end of each epoch", "0.1"),
        ("mean over pairs", "0.25"),
    ]
    assert "The mean of 3 classifies 50.0 % of 100 images" in text
    assert "not measured" not in text
    assert "<b>)" not in text  # escaped
    assert not re.search(r"https?://|<script|<link|@import|url\((?!#)", text)
    assert "not measured in this run" in page(SPEC, history(transfer=0.1), record())


def test_a_narrow_terminal_truncates_no_number() -> None:
    """The table of several members is wider than eighty columns."""
    console = Console(file=io.StringIO(), width=60)
    facts = {"any_right": 0.951, "transfer": 0.25, "white_box": 1.0, "cosine": -0.25}
    show_history(SPEC, history(**facts), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    for shown in ("test acc", "any_right", "white_box", "95.1 %", "25.0 %", "100.0 %", "-0.25", "images/s"):
        assert shown in text


def test_the_page_of_an_unfinished_training_run() -> None:
    text = page(SPEC, history()[:2], None)
    assert "2 of 4 epochs so far" in text
    assert 'class="number"' not in text
    begun = page(SPEC, [], None)
    assert "0 of 4 epochs so far" in begun
    assert curves(begun) == []


def test_samples_of_a_posterior_are_listed() -> None:
    sample = {"step": 4, "epoch": 1, "cycle": 1, "rate": 0.1, "accuracy": 0.25, "loss": None}
    text = page(SPEC, history(), record(samples=[sample, sample], accuracy={**vars(Rate.of(1, 4))}))
    assert "<td>#1</td><td>1</td><td>1</td><td>0.1</td><td>25.0%</td><td>–</td>" in text
    assert "The mean of 2 classifies" in text


def test_points_are_drawn_at_their_values() -> None:
    chart = Chart([Series("a", [(0.25, 0.0), (1.0, 2.0)]), Series("b", [(0.5, 1.0)])], "x", count_marks(4), str)
    drawn = str(chart.drawing)
    assert 'd="M250 180L1000 10"' in drawn
    assert '<svg x="50%" y="95"' in drawn
    assert ">4</text>" in drawn
    assert log_positions([10, 100, 1000]) == pytest.approx([0, 0.5, 1])
    assert log_positions([10]) == [0.5]
    flat = Chart([Series("a", [(1.0, 0.0)])], "x", count_marks(1), str)
    assert "nan" not in str(flat.drawing)
