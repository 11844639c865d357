"""Runs whose suite has arms: independent of interruptions and batches, with the unresolved images recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import Small, labelled

from robustkit import UsageError, evaluate, verify
from robustkit.cli import run
from robustkit.engine.evaluation.block_runner import BlockRunner
from robustkit.reporting.html.command import command
from robustkit.runs import run_folder
from robustkit.runs.evaluation_record import Report
from robustkit.runs.spec import RunSpec

SHAPE = (1, 7, 9)
N = 40
SUITE = "pgd(steps=2),apgd(steps=4)*,square(queries=8)*"
THREAT = "linf:0.02"


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockRunner, "_check", lambda *_: ([], []))  # which take most of so small a run


@cache
def model_and_data() -> tuple[Small, torch.Tensor, torch.Tensor]:
    net = Small(SHAPE[0]).eval()
    return net, *labelled(net, N, SHAPE)


def evaluated(order: np.ndarray | None = None, **words: Any) -> Report:
    net, x, y = model_and_data()
    order = np.arange(N) if order is None else order
    return evaluate(net, x[order], y[order], THREAT, **{"suite": SUITE, "precision": "fp32"} | words)


@cache
def uninterrupted() -> Report:
    return evaluated()


def facts_per_image(report: Report, order: np.ndarray | None = None) -> list[tuple[Any, ...]]:
    """Return which arms each image met, in the order of the data."""
    rows = [(v.label, v.robust, v.attack, pytest.approx(v.margin, abs=1e-4)) for v in report.verdicts]
    return rows if order is None else [rows[at] for at in np.argsort(order)]


def test_only_some_images_meet_each_arm() -> None:
    doubt = uninterrupted().strictness
    assert doubt is not None
    assert 0 < doubt.in_full < doubt.standing == sum(v.robust for v in uninterrupted().verdicts)
    assert doubt.images <= 1
    assert (doubt.bound, doubt.allowed) == (doubt.images / N, 0.002)


def test_verdicts_are_independent_of_batch_size_and_order() -> None:
    order = np.random.default_rng(4).permutation(N)
    for report, by in ((evaluated(batch_size=7), None), (evaluated(order), order)):
        assert facts_per_image(report, by) == facts_per_image(uninterrupted())
        assert report.strictness == uninterrupted().strictness


@pytest.mark.slow
def test_two_workers_give_the_same_report() -> None:
    report = evaluated(workers=2)
    assert (facts_per_image(report), report.strictness) == (
        facts_per_image(uninterrupted()),
        uninterrupted().strictness,
    )


@pytest.mark.parametrize(("at", "after"), [(0, True), (1, False), (2, True), (3, False)])
def test_a_run_killed_in_any_round_resumes_to_the_same_report(
    at: int, after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_row_wise: Callable[..., None] = BlockRunner.run_row_wise
    calls: list[int] = []

    def killed(self: BlockRunner, first: int, count: int, positions: np.ndarray) -> None:
        calls.append(first)
        if len(calls) == at + 1 and not after:
            raise KeyboardInterrupt
        run_row_wise(self, first, count, positions)
        if len(calls) == at + 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(BlockRunner, "run_row_wise", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluated(out=tmp_path / "r")
    again = evaluated(out=tmp_path / "r")
    assert (facts_per_image(again), again.strictness) == (
        facts_per_image(uninterrupted()),
        uninterrupted().strictness,
    )
    spent = [(stage.forwards, stage.backwards) for stage in again.stages[1:]]
    assert spent == [(stage.forwards, stage.backwards) for stage in uninterrupted().stages[1:]]


SCORES = "pgd(steps=1),square(queries=210)*"


@cache
def searched_by_scores() -> Report:
    return evaluated(suite=SCORES)


def test_a_score_attack_leaves_images_at_its_checkpoints() -> None:
    early, full = (report.stages[-1] for report in (searched_by_scores(), evaluated(suite=SCORES, strictness=0)))
    assert 200 * 8 < early.forwards < full.forwards
    assert early.fooled == full.fooled


def test_a_run_killed_in_the_test_of_a_score_attack_resumes_to_the_same_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def killed(self: BlockRunner) -> None:
        calls.append(0)
        if len(calls) == 203:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(BlockRunner, "_check_deadline", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluated(suite=SCORES, out=tmp_path / "r")
    again = evaluated(suite=SCORES, out=tmp_path / "r")
    assert facts_per_image(again) == facts_per_image(searched_by_scores())
    assert again.strictness == searched_by_scores().strictness
    assert again.stages[-1].forwards == searched_by_scores().stages[-1].forwards


def test_at_strictness_zero_every_robust_image_met_every_arm() -> None:
    report = evaluated(strictness=0)
    doubt = report.strictness
    assert doubt is not None
    assert (doubt.images, doubt.allowed) == (0, 0.0)
    assert doubt.in_full == doubt.standing > 0


def test_strictness_is_part_of_the_run_id_and_of_the_printed_command() -> None:
    strict, default = evaluated(strictness="5 %"), uninterrupted()
    assert strict.spec.strictness == 0.05
    assert strict.run_id != default.run_id
    assert "strictness=0.05" in command(strict)
    assert "strictness" not in command(default)
    assert "strictness" not in default.spec.identity
    assert RunSpec(**default.spec.identity).run_id == default.run_id


def test_the_run_folder_records_the_bound_and_verify_recomputes_it(tmp_path: Path) -> None:
    net, x, y = model_and_data()
    report = evaluated(out=tmp_path / "r")
    file = tmp_path / "r" / run_folder.REPORT
    assert verify(tmp_path / "r", net, x, y).bad == []
    body = json.loads(file.read_text())
    recorded = body["strictness"]
    assert report.strictness is not None
    assert recorded == vars(report.strictness)
    for changed in (recorded | {"in_full": recorded["in_full"] + 1}, recorded | {"images": 0, "bound": 0.0}, None):
        if changed != recorded:
            file.write_text(json.dumps(body | {"strictness": changed}))
            (fault,) = verify(tmp_path / "r", net, x, y).bad
            assert fault.startswith("report.json: it says that ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--strictness", "3"], "strictness '3' is not a share from 0 to 1; write a share"),
        (["--strictness", "-1"], "strictness '-1' is not a share from 0 to 1"),
        (["--strictness", "nan"], "strictness 'nan' is not a number"),
        (["--strictness", "x %"], "strictness 'x %' is not a number"),
        (["--strictness", "0.1", "--suite", "pgd"], "suite 'pgd' gives every image the same attacks"),
        (["--strictness", "0.1", "--threat", "l2:min"], "leave out strictness"),
    ],
)
@pytest.mark.parametrize("verb", ["evaluate", "plan"])
def test_an_invalid_strictness_is_refused(
    verb: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([verb, "--limit", "2", *words]) == 2
    error = capsys.readouterr().err
    assert message in " ".join(error.split())
    assert "Traceback" not in error


def test_an_invalid_strictness_is_refused_in_python() -> None:
    for value in (3, -1.0, float("nan"), "x %"):
        with pytest.raises(UsageError, match=r"strictness .* write a share of the images"):
            evaluated(strictness=value)
