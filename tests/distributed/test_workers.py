"""A run with several workers gives the results of one process, also if workers die."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import Small, labelled
from teams import Died, Watch, as_threads, in_worker

from robustkit import RunError, UsageError, evaluate
from robustkit.core.criteria import margin
from robustkit.core.threat import ThreatModel
from robustkit.engine.batching.continuous_batch import ContinuousBatch
from robustkit.engine.batching.samples import Admitted
from robustkit.engine.evaluation import evaluate_worker
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.engine.model.profiling import measure
from robustkit.models import as_classifier
from robustkit.registry import parse_suite
from robustkit.runs.evaluation_record import Report
from robustkit.runs.ledger import Chunk, Ledger

SHAPE = (3, 6, 8)
ROWS = "pgd(steps=6,restarts=2),apgd(steps=12),apgd-t(steps=6,targets=4),square(queries=30)"
COUPLED = "autoattack:apgd-ce(steps=8),autoattack:square(queries=60)"


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> None:
    as_threads(monkeypatch)


def run(workers: int, suite: str = ROWS, n: int = 30, **settings: Any) -> Report:
    net = Small()
    x, y = labelled(net, n, SHAPE)
    y[3] = (y[3] + 1) % 10
    said: dict[str, Any] = {"precision": "fp32", "batch_size": 8, **settings}
    return evaluate(net, x, y, "linf:0.02", suite=suite, workers=workers, **said)


def assert_same(one: Report, other: Report) -> None:
    assert one.run_id == other.run_id
    assert [(v.robust, v.attack) for v in one.verdicts] == [(v.robust, v.attack) for v in other.verdicts]
    assert np.allclose([v.margin for v in one.verdicts], [v.margin for v in other.verdicts], atol=1e-5)
    assert [stage.attack for stage in one.stages] == [stage.attack for stage in other.stages]
    assert [stage.fooled for stage in one.stages] == [stage.fooled for stage in other.stages]
    assert [flag.code for flag in one.flags] == [flag.code for flag in other.flags]
    passes = [[stage.forwards + stage.backwards for stage in report.stages] for report in (one, other)]
    assert np.allclose(passes[0], passes[1], rtol=0.05)


@pytest.mark.parametrize(
    ("suite", "counts"),
    [
        (ROWS, (2,)),
        (COUPLED, (2,)),
        *(pytest.param(suite, (2, 4), marks=pytest.mark.slow) for suite in (f"{COUPLED},{ROWS}", ROWS, "auto")),
    ],
)
def test_any_number_of_workers_gives_the_verdicts_of_one_process(suite: str, counts: tuple[int, ...]) -> None:
    alone = run(1, suite)
    assert 0 < sum(verdict.robust for verdict in alone.verdicts) < len(alone.verdicts) - 1
    for workers in counts:
        many = run(workers, suite)
        assert_same(alone, many)
        assert many.environment["workers"] == workers


@pytest.mark.parametrize(("suite", "n"), [(ROWS, 16), (COUPLED, 16), ("pgd(steps=2)", 40)])
def test_images_of_a_dead_worker_are_attacked_by_others(
    suite: str, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of enough images workers do the clean pass as well, and die in it."""
    write = evaluate_worker.Outbox.write
    deaths: list[Any] = []

    def dying(box: evaluate_worker.Outbox, *chunks: Chunk) -> None:
        if len(deaths) < 3:
            deaths.append(1)
            raise Died
        write(box, *chunks)

    alone, watch = run(1, suite, n=n), Watch()
    monkeypatch.setattr(evaluate_worker.Outbox, "write", dying)
    assert_same(alone, run(2, suite, n=n, progress=watch))
    assert sum("has died" in line for line in watch.said) == 3


def test_workers_that_die_before_any_verdict_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def dying(box: evaluate_worker.Outbox, *chunks: Chunk) -> None:
        raise Died

    monkeypatch.setattr(evaluate_worker.Outbox, "write", dying)
    with pytest.raises(RunError, match=r"workers die before they have done anything \(raised Died\); run without"):
        run(2)


@pytest.mark.parametrize("suite", [pytest.param(ROWS, marks=pytest.mark.slow), COUPLED])
def test_an_interrupted_run_resumes_with_any_number_of_workers(suite: str, tmp_path: Path) -> None:
    alone = run(1, suite)
    for after, workers in ((3, 1), (6, 2), (9, 3)):
        out = tmp_path / f"{after}"
        try:
            run(2, suite, out=out, progress=Watch(after))
        except KeyboardInterrupt:
            with Ledger.open(out / "ledger.sqlite", alone.run_id) as ledger:
                before = {(chunk.stage, chunk.chunk): chunk.seconds for chunk in ledger.chunks()}
        assert_same(alone, run(workers, suite, out=out))
        with Ledger.read(out / "ledger.sqlite", alone.run_id) as ledger:
            now = {(chunk.stage, chunk.chunk): chunk.seconds for chunk in ledger.chunks()}
        assert before.items() <= now.items()
        assert json.loads((out / "report.json").read_text())["run_id"] == alone.run_id


@pytest.mark.slow
def test_a_limit_stops_a_run_with_workers_at_the_same_image(tmp_path: Path) -> None:
    report = run(2, n=200, stop_at_width=0.4)
    assert_same(run(1, n=200, stop_at_width=0.4), report)
    assert report.stopped is not None


def test_a_model_that_cannot_be_sent_is_an_error_in_a_sentence() -> None:
    net = Small()
    x, y = labelled(net, 4, SHAPE)
    with pytest.raises(UsageError, match=r"cannot be sent to workers .* or leave --workers out"):
        evaluate(lambda images: net(images), x, y, "linf:0.02", suite="fgsm", workers=2)
    with pytest.raises(UsageError, match="workers must be from 1 to 1024, got 0"):
        evaluate(net, x, y, "linf:0.02", suite="fgsm", workers=0)


class FailsInWorker(Small):
    """Fails in workers once it has been called some times."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if in_worker():
            self.calls += 1
            if self.calls > 10:
                raise ValueError("this net has a bug")
        return super().forward(x)


def test_an_error_in_a_worker_ends_the_run() -> None:
    x, y = labelled(Small(), 12, SHAPE)
    with pytest.raises(RunError, match="ValueError: this net has a bug"):
        evaluate(FailsInWorker(), x, y, "linf:0.02", suite=ROWS, workers=2)


@pytest.mark.parametrize("after", [9, *(pytest.param(looks, marks=pytest.mark.slow) for looks in (0, 3, 20))])
def test_samples_move_to_another_continuous_batch_in_the_middle_of_an_attack(after: int) -> None:
    net = Small().eval()
    x, y = labelled(net, 24, SHAPE)
    clean = -margin(net(x), y).detach()
    instrumented = InstrumentedModel(as_classifier(net), torch.device("cpu"))
    measure(instrumented, x[:1], 64)
    entries = parse_suite(ROWS, "linf")

    def batch(waiting: np.ndarray) -> ContinuousBatch:
        def admit(free: int) -> Admitted:
            nonlocal waiting
            part, waiting = waiting[:free], waiting[free:]
            return Admitted(part, torch.from_numpy(part), x[part], y[part], -clean[part], -clean[part])

        names = [entry.attack.info.name for entry in entries]

        def recover() -> None:
            raise AssertionError("memory is not short here")

        return ContinuousBatch(
            instrumented, ThreatModel.parse("linf:0.02"), entries, names, 0, 64, admit, recover=recover
        )

    def verdicts(groups: list[Any]) -> dict[int, tuple[bool, int]]:
        parts = [part for group in groups for part in group]
        return {
            at: (fooled, stage)
            for part in parts
            for at, fooled, stage in zip(
                part.position.tolist(), part.judged.fooled.tolist(), part.stage.tolist(), strict=True
            )
        }

    whole = verdicts(list(batch(np.arange(24)).run()))
    first, second = batch(np.arange(24)), batch(np.zeros(0, np.int64))
    looks = first.run()
    groups = [next(looks) for _ in range(after + 1)]
    active = first.active
    for number, rows in first.give_half():
        second.restore(number, 0, rows)
    assert first.active + second.active == active
    assert second.active > 0
    assert verdicts([*groups, *looks, *second.run()]) == whole
