"""What `plan` forecasts of a run, compared with the run; planning changes no state."""

from __future__ import annotations

import json
import random
from dataclasses import FrozenInstanceError, replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import Small, labelled

from robustkit import evaluate, plan
from robustkit.core.errors import UsageError
from robustkit.core.intervals import mean_cost_interval
from robustkit.core.threat import ThreatModel
from robustkit.data import from_arrays
from robustkit.engine.evaluation.block_runner import BlockRunner
from robustkit.engine.planning import cost_probe
from robustkit.engine.planning.cost_probe import CostProbe, ProbeResult
from robustkit.engine.planning.forecast import Costs
from robustkit.engine.planning.forecast import forecast_cost as measure
from robustkit.models import as_classifier
from robustkit.runs.evaluation_record import Report
from robustkit.runs.forecast_record import Plan

SHAPE = (3, 6, 8)
FLOWN = "pgd(steps=8),race(targets=3,probe=2,steps=4),square(queries=20)"
ARMED = "pgd(steps=2),apgd(steps=3)*,square(queries=9)*,pgd(steps=3)"
COUPLED = "autoattack:apgd-ce(steps=5),autoattack:square(queries=30)"
N = 30


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_probe, "MAX_FIRST_BLOCK", 12)
    monkeypatch.setattr(cost_probe, "MIN_FIRST_BLOCK", 12)
    monkeypatch.setattr(BlockRunner, "_check", lambda *_: ([], []))  # which take most of so small a run


def probe(suite: str, budget: float, step: float = 1e-6, n: int = N) -> CostProbe:
    """A probe of an evaluation, with a clock that advances by `step` at each reading."""
    net = Small().eval()
    x, y = labelled(net, n, SHAPE)
    ticks = count()
    return CostProbe(
        as_classifier(net),
        from_arrays(x, y),
        ThreatModel.parse("linf:0.02"),
        suite,
        precision="fp32",
        batch_size=15,
        budget=budget,
        clock=lambda: step * next(ticks),
    )


def total_passes(report: Report) -> int:
    """Forward and backward passes of all attacks."""
    return sum(stage.forwards + stage.backwards for stage in report.stages[1:])


@cache
def cost_per_image(suite: str) -> float:
    """The measured mean cost of an image in the whole run."""
    net = Small().eval()
    x, y = labelled(net, N, SHAPE)
    return total_passes(evaluate(net, x, y, "linf:0.02", suite=suite, precision="fp32")) / N


@pytest.mark.parametrize("suite", [FLOWN, ARMED, COUPLED])
def test_a_probe_without_a_time_limit_measures_every_image(suite: str) -> None:
    found = measure(probe(suite, budget=1e9))
    assert (found.trial.images, found.trial.through) == (N, N)
    assert found.propagations.low == pytest.approx(found.propagations.high)
    # Another package's attacks cost by batches, and these are others.
    assert found.propagations.value == pytest.approx(
        cost_per_image(suite), rel=0.3 if suite == COUPLED else 0.0, abs=1e-6
    )
    assert found.most is not None
    assert found.most >= found.propagations.value


@pytest.mark.parametrize(("suite", "budget"), [(FLOWN, 4), (FLOWN, 40), (ARMED, 8), (ARMED, 16), (COUPLED, 30)])
def test_the_interval_of_a_shortened_probe_covers_the_measured_cost(suite: str, budget: int) -> None:
    found = measure(probe(suite, budget=budget, step=1.0))
    assert found.trial.images < N or found.trial.through < N
    assert found.propagations.low <= cost_per_image(suite) <= found.propagations.high
    assert found.propagations.low < found.propagations.value < found.propagations.high
    for scale in found.scales:
        assert 0 < scale.seconds.low <= scale.seconds.value <= scale.seconds.high


def test_the_record_holds_the_requested_devices_and_prices() -> None:
    net = Small().eval()
    x, y = labelled(net, N, SHAPE)
    found = plan(net, x, y, "linf:0.02", suite="fgsm", seconds=0.2, devices=[1, 4], price=3.0)
    assert isinstance(found, Plan)
    assert [scale.devices for scale in found.scales] == [1, 4]
    for scale in found.scales:
        assert scale.money is not None
        assert scale.money.value == pytest.approx(3 * scale.device_hours.value)
        assert scale.device_hours.value == pytest.approx(scale.devices * scale.seconds.value / 3600)
    assert found.scales[0].efficiency == pytest.approx(1)
    body = json.loads(json.dumps(found.to_json()))
    assert next(iter(body)) == "format"
    assert body["scales"][1]["seconds"]["value"] == found.scales[1].seconds.value
    assert found.memory.peak >= found.memory.held > 0
    unlocked: Any = found
    with pytest.raises(FrozenInstanceError):
        unlocked.n = 3


def test_plan_changes_no_global_state_and_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    net = Small().train()
    x, y = labelled(net.eval(), N, SHAPE)
    net.train()
    states = [torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()]
    plan(net, x, y, "linf:0.02", suite=COUPLED, seconds=0.05)
    assert net.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())
    assert torch.equal(states[0], torch.random.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()
    assert states[2] == random.getstate()
    assert not list(tmp_path.iterdir())


def measurements() -> ProbeResult:
    return probe("pgd(steps=4)", budget=1e9, step=0.001, n=12).measure()


def test_attacks_without_a_bound_on_their_length_are_forecast() -> None:
    known = replace(measurements(), max_costs=None)
    costs = Costs.of(known, 100)
    assert costs.mean.low <= costs.mean.value <= costs.mean.high
    assert {len(jobs) for jobs in costs.sample(40, 0)} == {40}
    with pytest.raises(UsageError, match="measure longer with --seconds"):
        Costs.of(replace(known, finished=np.arange(12) > 3), 100)


def test_the_ends_of_the_interval_are_simulated_with_their_mean_costs() -> None:
    costs = Costs.of(measurements(), 100)
    assert costs.worst is not None
    each = costs.worst.work / costs.most if costs.most else 0.0
    value, low, high = (sum(job.work for job in jobs) / 4000 for jobs in costs.sample(4000, 0))
    assert low <= value <= high
    assert high / each == pytest.approx(costs.mean.high, rel=0.2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"devices": [0]}, "devices '0': write whole numbers from 1"),
        ({"devices": []}, "devices '': write whole numbers from 1"),
        ({"price": -1.0}, "price must be at least 0, got -1."),
        ({"seconds": 0.0}, "seconds must be above 0, got 0."),
        ({"suite": "nothing"}, "no suite or attack 'nothing'"),
    ],
)
def test_bad_input_is_one_sentence(words: dict[str, Any], message: str) -> None:
    net = Small().eval()
    x, y = labelled(net, 4, SHAPE)
    with pytest.raises(UsageError, match=message):
        plan(net, x, y, "linf:0.02", **words)


def test_an_interval_for_a_mean_of_costs() -> None:
    assert mean_cost_interval([1.0, 3.0], [1.0, 3.0], 2, most=9.0) == (2.0, 2.0)
    low, high = mean_cost_interval([1.0, 3.0], [1.0, 5.0], 2, most=9.0)
    assert (low, high) == (2.0, 3.0)
    # A few cheap images do not rule out that others are dear.
    low, high = mean_cost_interval([2.0] * 10, [2.0] * 10, 10_000, most=1000.0)
    assert low < 2
    assert 100 < high < 500
    rng = np.random.default_rng(1)
    costs = np.where(rng.random(5000) < 0.05, 500.0, 3.0)
    held = 0
    for _ in range(60):
        sample = rng.choice(costs, 20, replace=False).tolist()
        low, high = mean_cost_interval(sample, sample, 5000, most=1000.0, draws=400)
        held += low <= costs.mean() <= high
    assert held >= 54
