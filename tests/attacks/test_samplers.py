"""The samplers' hooks: what is kept when, at which rate, with which noise, and what is drawn in the end."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustkit.core.errors import UsageError
from robustkit.core.rng import RowRng
from robustkit.registry import make_method
from robustkit.training.loop import take_step
from robustkit.training.method import Batch, Method, Plan
from robustkit.training.posterior_method import kept_steps

PLAN = Plan(samples=200, classes=4, batch_size=20, epochs=12, lr=0.5)
BLOBS = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(200) % 4
BLOBS[:, 0] += LABELS


def net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))


def batch(step: int, plan: Plan = PLAN) -> Batch:
    place = step % plan.steps_per_epoch * plan.batch_size
    rows = torch.arange(place, place + plan.batch_size)
    return Batch(BLOBS[rows], LABELS[rows], RowRng(plan.seed, "test", rows, step=step), step)


def train(method: Method, plan: Plan = PLAN, model: nn.Module | None = None) -> tuple[nn.Module, list[Any]]:
    """The loop of a training, and the states that it keeps."""
    model = model or net()
    optimizer = method.optimizer(model.parameters(), plan)
    kept = []
    for step in range(plan.steps):
        optimizer.zero_grad()
        method.backward([model], batch(step, plan), plan)
        take_step(method, [optimizer], step, plan)
        if step in kept_steps(method, plan, plan.steps):
            kept.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    return model, kept


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


def steps_kept(method: Method, plan: Plan = PLAN) -> list[int]:
    return kept_steps(method, plan, plan.steps)


@pytest.mark.parametrize("name", ["csgld", "csghmc"])
def test_cycles(name: str) -> None:
    """C1 and C2: the rate comes round; samples are the ends of each cycle's last epochs, noise is in its last."""
    method = make_method(name, cycles=3, samples_per_cycle=2, noise_epochs=1)
    epochs = [(step + 1) / PLAN.steps_per_epoch - 1 for step in steps_kept(method)]
    assert epochs == [2, 3, 6, 7, 10, 11]
    noisy = {step // PLAN.steps_per_epoch for step in range(PLAN.steps) if method.noisy(step, PLAN)}
    assert noisy == {3, 7, 11}
    assert [method.cycle(step, PLAN) for step in steps_kept(method)] == [0, 0, 1, 1, 2, 2]
    rates = [method.rate(step, PLAN) for step in range(PLAN.steps)]
    assert rates[0] == rates[40] == rates[80] == 0.5
    assert rates[20] == pytest.approx(0.25)
    assert min(rates) > 0


@pytest.mark.parametrize("name", ["csgld", "csghmc"])
def test_a_cold_cycle_is_a_snapshot_ensemble(name: str) -> None:
    """C4, bitwise; and heat matters."""
    fields = {"cycles": 3, "samples_per_cycle": 2}
    cold = train(make_method(name, temperature=0, noise_epochs=3, **fields))[1]
    still = train(make_method(name, temperature=1, noise_epochs=0, **fields))[1]
    warm = train(make_method(name, temperature=1, noise_epochs=3, **fields))[1]
    assert len(cold) == len(warm) == 6
    assert all(same(one, two) for one, two in zip(cold, still, strict=True))
    assert not any(same(one, two) for one, two in zip(cold, warm, strict=True))


def test_noise_is_absent_outside_the_noise_epochs() -> None:
    """C3: up to the first noisy step a run is bitwise that of any temperature."""
    plan = replace(PLAN, epochs=2)
    ends = [
        train(make_method("csgld", cycles=1, samples_per_cycle=2, noise_epochs=1, temperature=t), plan)[1]
        for t in (0.0, 1.0)
    ]
    assert same(ends[0][0], ends[1][0])
    assert not same(ends[0][1], ends[1][1])


@pytest.mark.parametrize("name", ["csgld", "csghmc", "sgld"])
def test_one_step_moves_as_far_at_any_batch_size(name: str) -> None:
    """The noise of a step knows N and T, and neither the batch size nor the batches."""
    spreads = []
    for size in (4, 100):
        plan = replace(PLAN, batch_size=size)
        weights = nn.Parameter(torch.zeros(5000))
        optimizer = make_method(name, temperature=1.0).optimizer([weights], plan)
        weights.grad = torch.zeros(5000)
        optimizer.param_groups[0].update(lr=0.1, counter=7, noisy=True, weight_decay=0)
        optimizer.step()
        spreads.append(float(weights.detach().std()))
    friction = 0.1 if name == "csghmc" else 1
    assert spreads[0] == spreads[1] == pytest.approx(math.sqrt(2 * friction * 0.1 / plan.samples), rel=0.05)


def test_members_draw_noise_of_their_own() -> None:
    ends = [train(make_method("sgld"), replace(PLAN, seed=seed))[0].state_dict() for seed in (0, 0, 1)]
    assert same(ends[0], ends[1])
    assert not same(ends[0], ends[2])


@pytest.mark.parametrize("name", ["sgld", "psgld"])
def test_one_chain(name: str) -> None:
    """Every step is noisy, the rate falls as a power, snapshots are even after the burn-in."""
    method = make_method(name, snapshots=4, burn_in=0.5)
    assert steps_kept(method) == [74, 89, 104, 119]
    assert all(method.noisy(step, PLAN) for step in range(PLAN.steps))
    assert method.rate(0, PLAN) == 0.5
    assert method.rate(10, PLAN) == pytest.approx(0.5 * 2**-0.55)


@pytest.mark.parametrize("name", ["sgld", "psgld"])
def test_a_cold_chain_has_no_noise(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cold = train(make_method(name, temperature=0), replace(PLAN, lr=0.01))[0].state_dict()
    method = make_method(name, temperature=1)
    monkeypatch.setattr(type(method), "noisy", lambda self, step, plan: False)
    assert same(cold, train(method, replace(PLAN, lr=0.01))[0].state_dict())


def test_the_vicinity_is_kept_evenly_at_one_rate() -> None:
    """F: 4 snapshots an epoch at equal distances, a constant high rate, before it an ordinary training."""
    method = make_method("lgv", collect_epochs=10, snapshots_per_epoch=5)
    assert steps_kept(method) == list(range(21, 120, 2))
    assert {method.rate(step, PLAN) for step in range(20, 120)} == {0.25}
    rates = [method.rate(step, PLAN) for step in range(20)]
    assert rates[0] == 0.5
    assert rates == sorted(rates, reverse=True)
    assert len(steps_kept(make_method("lgv"), replace(PLAN, batch_size=5))) == 40


def test_a_vicinity_at_rate_zero_is_the_start() -> None:
    method = make_method("lgv", collect_epochs=2, snapshots_per_epoch=2, collect_rate=0)
    kept = train(method)[1]
    assert len(kept) == 4
    assert all(same(dict(net_weights(kept[0])), dict(net_weights(state))) for state in kept)


def net_weights(state: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    return [(name, tensor) for name, tensor in state.items() if "running" not in name and "num" not in name]


def test_swag_fits_the_last_epochs() -> None:
    method = make_method("swag", start=0.5, rank=3, draws=5)
    assert steps_kept(method) == [69, 79, 89, 99, 109, 119]
    assert method.rate(0, PLAN) == 0.5
    assert {method.rate(step, PLAN) for step in range(60, 120)} == {0.05}
    kept = train(method)[1]
    drawn = list(method.samples(iter(kept), PLAN))
    assert len(drawn) == 5
    assert not same(drawn[0], drawn[1])
    assert all(set(state) == set(kept[0]) for state in drawn)
    again = list(method.samples(iter(kept), PLAN))
    assert all(same(one, two) for one, two in zip(drawn, again, strict=True))
    mean = torch.stack([state["0.weight"] for state in kept]).mean(0)
    (still,) = make_method("swag", scale=0, draws=1, rank=3).samples(iter(kept), PLAN)
    assert torch.allclose(still["0.weight"], mean, atol=1e-6)
    net().load_state_dict(drawn[0])
    # Without columns it is diagonal, with all of the variance.
    diagonal = make_method("swag", start=0.5, rank=0, draws=400)
    spread = torch.stack([state["0.weight"] for state in kept]).std(0, correction=0)
    found = torch.stack([state["0.weight"] for state in diagonal.samples(iter(kept), PLAN)])
    assert torch.allclose(found.std(0) / spread, torch.ones_like(spread), atol=0.2)


def test_mba_stores_all_samples_and_draws_from_a_diagonal_normal() -> None:
    method = make_method("mba", collect_epochs=2, draws=400)
    assert len(steps_kept(method)) == 20
    assert len(steps_kept(make_method("mba", collect_epochs=2, snapshots=7))) == 7
    kept = train(method, replace(PLAN, lr=0.1))[1]
    drawn = torch.stack([state["0.weight"] for state in method.samples(iter(kept), PLAN)])
    spread = torch.stack([state["0.weight"] for state in kept]).std(0, correction=0)
    assert torch.allclose(drawn.std(0) / (1.5 * spread), torch.ones_like(spread), atol=0.2)


def test_the_fine_tuning_rate_is_the_papers_except_on_small_sets() -> None:
    method = make_method("mba")
    for samples, share in ((50_000, 0.5), (1437, 0.1)):
        plan = replace(PLAN, samples=samples, lr=0.1)
        assert method.rate(plan.steps - 1, plan) == pytest.approx(0.1 * share)


def test_mba_without_flatness_is_plain_descent() -> None:
    """F, bitwise; and before the last epochs at any flatness."""
    plain = train(make_method("mba", flatness=0, collect_epochs=2, collect_rate=0.5))[1]
    flat = train(make_method("mba", flatness=1, collect_epochs=2, collect_rate=0.5))[1]
    lgv = train(make_method("lgv", collect_epochs=2, snapshots_per_epoch=10, weight_decay=5e-4))[1]
    assert len(plain) == len(lgv) == 20
    assert all(same(one, two) for one, two in zip(plain, lgv, strict=True))
    assert not same(plain[0], flat[0])


def test_flatness_adds_the_hessian_along_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """F: on a quadratic the extra term is flatness H g / |g| exactly, and the weights come back bitwise."""
    from robustkit.attacks.bayesian.mba import flatten

    root = torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    curvature = root @ root.T

    class Quadratic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.linspace(-1, 2, 5, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * self.weight @ curvature @ self.weight

    monkeypatch.setattr("torch.nn.functional.cross_entropy", lambda value, y: value)
    model = Quadratic()
    before = model.weight.detach().clone()
    model(None).backward()
    gradient = model.weight.grad.clone()
    flatten(model, batch(0), 0.7, 0.1)
    assert torch.equal(model.weight.detach(), before)
    wanted = gradient + 0.7 * curvature @ gradient / gradient.norm()
    assert model.weight.grad is not None
    assert torch.allclose(model.weight.grad, wanted, rtol=1e-12)


def test_flatness_at_a_stationary_point_is_finite() -> None:
    from robustkit.attacks.bayesian.mba import flatten

    model = nn.Linear(3, 4)
    nn.init.zeros_(model.weight)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    flatten(model, batch(0), 1.0, 0.1)
    assert all(weight.grad.isfinite().all() for weight in model.parameters())


@pytest.mark.parametrize(
    ("name", "fields", "plan", "word"),
    [
        ("csgld", {"cycles": 5}, PLAN, "12 epochs cannot be divided into 5 equal cycles"),
        ("csgld", {"cycles": 6, "samples_per_cycle": 3}, PLAN, "samples_per_cycle=3 is more than the 2 epochs"),
        ("csghmc", {"cycles": 2, "momentum": 1.0}, PLAN, "csghmc: momentum=1.0"),
        ("csgld", {"cycles": 2, "temperature": -1}, PLAN, "temperature=-1 must be at least 0"),
        ("csgld", {"cycles": 2, "temperature": "nan"}, PLAN, "temperature"),
        ("csgld", {"cycles": 2, "batch_norm": "kept"}, PLAN, "no batch_norm 'kept'"),
        ("sgld", {"burn_in": 1.0}, PLAN, "burn_in=1.0 must be at least 0 and below 1"),
        ("sgld", {"snapshots": 200}, PLAN, "snapshots=200 is more than the 36 steps"),
        ("psgld", {"damping": 0}, PLAN, "psgld: damping=0 must be at least 1e-12"),
        ("lgv", {"collect_epochs": 20}, PLAN, "collect_epochs=20 must be at most the run's 12 epochs"),
        ("lgv", {"snapshots_per_epoch": 11}, PLAN, "more than the 10 steps"),
        ("mba", {"radius": 0}, PLAN, "mba: radius=0 must be at least 1e-06"),
        ("swag", {"draws": 0}, PLAN, "draws=0 must be at least 1"),
        ("swag", {"rank": -1}, PLAN, "rank=-1 must be at least 0"),
        ("swag", {}, replace(PLAN, members=2), "swag trains one net"),
        ("deep-ensemble", {"momentum": 2}, PLAN, "momentum=2 must be at least 0 and below 1"),
    ],
)
def test_invalid_options_are_refused(name: str, fields: dict[str, Any], plan: Plan, word: str) -> None:
    with pytest.raises(UsageError, match=word.replace("(", r"\(")):
        make_method(name, **fields).check_plan(plan)


def test_a_deep_ensemble_may_have_members() -> None:
    method = make_method("deep-ensemble")
    method.check_plan(replace(PLAN, members=5))
    assert method.default_size(50_000).members == 5
    assert not steps_kept(method)
    assert method.rate(0, PLAN) == 0.5
    assert method.rate(60, PLAN) == pytest.approx(0.25)
