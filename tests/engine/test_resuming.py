"""A run that is killed often ends with the result of an uninterrupted one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from nets import Small, labelled
from torch import Tensor

from robustkit import craft, evaluate
from robustkit.core.errors import UsageError
from robustkit.engine.batching import saved_rows
from robustkit.engine.evaluation import batch_runner, block_runner
from robustkit.engine.model import instrumented_model, profiling, tuning
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.runs import recorded_outputs
from robustkit.runs.craft_record import Craft
from robustkit.runs.evaluation_record import Report
from robustkit.runs.recorded_outputs import recording
from robustkit.runs.unfinished_work import Store, encoded

T = TypeVar("T")
SHAPE = (3, 7, 5)


class Interrupted(torch.nn.Module):
    """A net that is interrupted after a number of images; `noise` makes it random."""

    def __init__(self, noise: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        self.net, self.noise = Small(seed=seed).eval(), noise
        self.left: float = float("inf")
        self.most = 0

    def forward(self, x: Tensor) -> Tensor:
        self.left -= len(x)
        self.most = max(self.most, len(x))
        if self.left < 0:
            raise KeyboardInterrupt
        out: Tensor = self.net(x + self.noise * torch.randn_like(x))
        return out


@pytest.fixture
def write_every_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat every net as slow, so that every pass is written at once."""
    monkeypatch.setattr(instrumented_model, "SLOW_BATCH_SECONDS", 0.0)
    monkeypatch.setattr(instrumented_model, "PART_SECONDS", 0.0)
    monkeypatch.setattr(profiling, "SLOW_BATCH_SECONDS", 0.0)
    monkeypatch.setattr(profiling, "PART_SECONDS", 0.0)
    monkeypatch.setattr(recorded_outputs, "WRITE_EVERY", 0.0)
    monkeypatch.setattr(recorded_outputs, "MAX_COST_SHARE", float("inf"))
    monkeypatch.setattr(saved_rows, "LONG_STEP", 0.0)
    # The way to run a net is chosen by the clock, and another memory layout draws other noise.
    monkeypatch.setattr(block_runner, "tune", lambda *model, **options: 0)


def run_until_finished(nets: Sequence[Interrupted], run: Callable[[], T], images: int) -> tuple[T, int]:
    """Run until finished, a number of images each time; return the report and how many runs were interrupted."""
    for interrupted in range(500):
        for net in nets:
            net.left = images
        try:
            return run(), interrupted
        except KeyboardInterrupt:
            pass
    raise AssertionError("the run does not end")


def outcomes(report: Report) -> list[Any]:
    return [
        [(v.index, v.robust, v.attack, v.clean_prediction, v.margin) for v in report.verdicts],
        [(stage.attack, stage.fooled, stage.forwards, stage.backwards) for stage in report.stages],
        [(flag.code, flag.value) for flag in (*report.flags, *report.passed)],
        None if report.curve is None else (report.curve.distances, report.curve.cost.forwards),
        None if report.audit is None else (report.audit.audited, report.audit.broke),
    ]


CASES: list[Any] = [
    ("pgd(steps=2),square(queries=6)", 0.0, {}),
    ("autoattack:apgd-ce(steps=4),autoattack:square(queries=6)", 0.0, {}),
    ("foolbox:LinfPGD(steps=4)", 0.0, {}),
    pytest.param("pgd(steps=2)", 0.02, {}, marks=pytest.mark.slow),
    pytest.param("pgd(steps=1)", 0.0, {"curve": True}, marks=pytest.mark.slow),
    pytest.param("pgd(steps=1)", 0.0, {"audit": 1}, marks=pytest.mark.slow),
]


@pytest.mark.usefixtures("write_every_pass")
@pytest.mark.parametrize("checked", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("suite", "noise", "more"), CASES)
def test_a_run_killed_after_every_few_passes_ends_with_the_same_result(
    suite: str, noise: float, more: dict[str, Any], checked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not checked:
        monkeypatch.setattr(batch_runner.BatchRunner, "_check", lambda self, x, positions: ([], []))
    net = Interrupted(noise)
    x, y = labelled(net.net, 3, SHAPE)

    def run(folder: str) -> Report:
        return evaluate(net, x, y, "linf:0.03", suite=suite, precision="fp32", out=tmp_path / folder, **more)

    whole = run("whole")
    assert net.most == 1
    pieces, interrupted = run_until_finished(
        [net], lambda: run("pieces"), 60 if checked else 15 + 15 * bool(noise)
    )
    assert interrupted > 1
    assert outcomes(pieces) == outcomes(whole)
    assert not list((tmp_path / "pieces").glob(".unfinished*"))


@pytest.mark.slow
@pytest.mark.usefixtures("write_every_pass")
def test_a_craft_run_killed_after_every_few_passes_ends_with_the_same_result(tmp_path: Path) -> None:
    nets = [Interrupted(), Interrupted(seed=1), Interrupted(seed=2)]
    x, y = labelled(nets[0].net, 3, SHAPE)

    def run(folder: str) -> Craft:
        return craft(
            nets[:2], x, y, "linf:0.05", attack="mi-fgsm(steps=3)+di", targets=nets[2], out=tmp_path / folder
        )

    whole = run("whole")
    assert max(net.most for net in nets) == 1
    pieces, interrupted = run_until_finished(nets, lambda: run("pieces"), 9)
    assert interrupted > 1
    assert np.array_equal(pieces.adversarial["x"], whole.adversarial["x"])
    assert pieces.gradients_per_image == whole.gradients_per_image
    assert [one.predictions for one in pieces.targets] == [one.predictions for one in whole.targets]
    assert not list((tmp_path / "pieces").glob(".unfinished*"))


def test_records_after_a_damaged_one_are_not_used(tmp_path: Path) -> None:
    store = Store(tmp_path / "work", "abcd1234")
    with recording(store, "work") as record:
        for value in (1.0, 2.0, 3.0):
            record.call(lambda x: 2 * x, torch.full((1, 2), value), differentiable=False, keep=True)
        record.write()
    file = tmp_path / "work" / "abcd1234.work"
    body = bytearray(file.read_bytes())
    body[len(body) // 2] ^= 1
    file.write_bytes(body)
    calls: list[int] = []

    def net(x: Tensor) -> Tensor:
        calls.append(1)
        return 2 * x

    with recording(store, "work") as record:
        for value in (1.0, 2.0, 3.0):
            assert record.call(net, torch.full((1, 2), value), differentiable=False, keep=True)[0, 0] == 2 * value
    assert len(calls) == 2


def test_a_record_of_another_query_is_not_used(tmp_path: Path) -> None:
    store = Store(tmp_path / "work", "abcd1234")
    with recording(store, "work") as record:
        record.call(lambda x: x, torch.zeros(1, 2), differentiable=False, keep=True)
        record.write()
    with recording(store, "work") as record:
        assert bool((record.call(lambda x: x + 1, torch.ones(1, 2), differentiable=False, keep=True) == 2).all())


def test_a_symlink_in_place_of_a_record_is_not_followed(tmp_path: Path) -> None:
    store, precious = Store(tmp_path / "work", "abcd1234"), tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "abcd1234.flight").symlink_to(precious)
    with pytest.raises(UsageError, match="is a link"):
        store.append("flight", encoded({"kind": "begin"}))
    store.replace("flight", encoded({"kind": "begin"}))
    assert precious.read_text() == "mine"


def test_random_generators_resume_at_their_state(tmp_path: Path) -> None:
    store = Store(tmp_path / "work", "abcd1234")

    def noisy(x: Tensor) -> Tensor:
        return x + torch.randn(1) + np.random.randn()

    def draw() -> float:
        with recording(store, "work") as record:
            torch.manual_seed(0)
            np.random.seed(0)
            record.call(
                lambda x: x + torch.randn(1) + np.random.randn(), torch.ones(1), differentiable=False, keep=True
            )
            record.write()
            return float(torch.randn(1)) + np.random.randn()

    assert draw() == draw()


def test_execution_config_is_chosen_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A busier machine would choose another precision or layout, and so other margins."""
    net, tried, left = Interrupted(), [], [5, float("inf")]
    x, y = labelled(net, 6, SHAPE)
    timed_pass, tune = profiling.timed_pass, tuning.tune

    def counted(model: InstrumentedModel, x: Tensor) -> Any:
        tried.append(model.config)
        return timed_pass(model, x)

    def tuned(*model: Any, **options: Any) -> int:
        images = tune(*model, **options)
        net.left = left.pop(0)
        return images

    monkeypatch.setattr(tuning, "timed_pass", counted)
    monkeypatch.setattr(block_runner, "tune", tuned)
    with pytest.raises(KeyboardInterrupt):
        evaluate(net, x, y, "linf:0.02", suite="pgd(steps=4)", out=tmp_path / "run")
    before = len(tried)
    net.left = float("inf")
    evaluate(net, x, y, "linf:0.02", suite="pgd(steps=4)", out=tmp_path / "run")
    assert before > 1
    assert len(tried) == before
