"""Steps that go on from what is remembered: one by hand, and what a member learns of them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.core.errors import UsageError
from robustkit.core.rng import RowRng
from robustkit.defenses.diversity.fasten import FASTEN, divergence_from_mean
from robustkit.models.layers.features import features
from robustkit.registry import make_method
from robustkit.training.method import Batch, Plan

PLAN = Plan(samples=64, classes=4, batch_size=8, epochs=4, lr=0.05, members=3)


def fasten(**fields: Any) -> FASTEN:
    return make_method("fasten", **{"baseline": 0.0, **fields})


class Weighted(nn.Module):
    """A weighted sum of pixels as the only feature."""

    def __init__(self, *weights: float) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(weights))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weights[:, None]


def net(seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten(), nn.Linear(140, 4)
        ).train()


def batch(step: int = 0, members: int = 3) -> Batch:
    x = torch.rand(8, 3, 7, 9, generator=torch.Generator().manual_seed(1))
    rng = RowRng(0, "method", torch.arange(8), step=step)
    return Batch(x, torch.arange(8) % 4, rng, step, memory=torch.zeros(8, members, 3, 7, 9, dtype=torch.int8))


def test_a_step_continues_from_the_stored_perturbation() -> None:
    """f = 2a - b - c/2; from (+, +, +) it is above its own value, so it climbs: +2, -1 and -1, in eps."""
    x = torch.full((1, 1, 1, 3), 0.5)
    memory = torch.ones(1, 2, 1, 1, 3, dtype=torch.int8)
    memory[0, 1] = torch.tensor([-1, 1, 0])
    one = Batch(x, torch.zeros(1, dtype=torch.int64), RowRng(0, "method", torch.arange(1)), 0, memory=memory)
    up, down = fasten(layer="1").moved([Weighted(2, -1, -0.5), Weighted(2, -1, -0.5)], one, PLAN)
    torch.testing.assert_close(up.flatten(), torch.tensor([0.56, 0.5, 0.5]))
    torch.testing.assert_close(down.flatten()[:2], torch.tensor([0.44, 0.56]))
    assert memory[0, 0].flatten().tolist() == [1, 0, 0]
    assert memory[0, 1].flatten().tolist()[:2] == [-1, 1]


def test_images_stay_in_ball_and_box_and_go_away() -> None:
    nets, one = [net(seed) for seed in range(3)], batch()
    one.x[:, :, 0] = 0
    one.x[:, :, 1] = 1
    for step in range(3):
        moved = fasten(layer="2").moved(nets, replace(one, step=step), PLAN)
        for member, x in enumerate(moved):
            assert ((x - one.x).abs() <= 0.06 + 1e-6).all()
            assert ((x >= 0) & (x <= 1)).all()
            assert one.memory is not None
            signs = one.memory[:, member]
            assert set(signs.unique().tolist()) <= {-1, 0, 1}
            assert torch.equal(signs, ((x - one.x) / 0.06).round().to(torch.int8))


def test_stored_perturbations_grow() -> None:
    """Features of frozen nets are further from the image's own after some epochs than after one."""
    nets, one = [net(seed).eval() for seed in range(3)], batch()
    method, far = fasten(layer="2"), []
    for step in (0, 16, 32, 48):
        x = method.moved(nets, replace(one, step=step, rng=one.rng.at(step=step)), PLAN)[0]
        far.append((features(nets[0], x, 2) - features(nets[0], one.x, 2)).square().flatten(1).sum(1))
    assert float((far[-1] > far[0]).float().mean()) > 0.8


def test_each_learns_from_one_other_which_changes() -> None:
    """And the loss is its cross-entropy on the other's images plus what its answers are apart."""
    seen = set()
    for step in range(8):
        nets, one = [net(seed).eval() for seed in range(3)], batch(step)
        method = fasten(layer="2")
        moved = method.moved(nets, replace(one, memory=batch().memory), PLAN)
        loss = float(method.backward(nets, one, PLAN))
        possible = {}
        for places in (1, 2):
            total = 0.0
            for number, member in enumerate(nets):
                with torch.no_grad():
                    logits = member(moved[(number + places) % 3])
                    total += float(
                        F.cross_entropy(logits, one.y) + 3 * divergence_from_mean(member(one.x), logits)
                    )
            possible[places] = total / 3
        nearest = min(possible, key=lambda places: abs(possible[places] - loss))
        assert loss == pytest.approx(possible[nearest], abs=1e-5)
        seen.add(nearest)
    assert seen == {1, 2}


def test_a_member_moves_by_its_own_loss_alone() -> None:
    nets = [net(seed) for seed in range(3)]
    fasten().backward(nets, batch(), PLAN)
    alone = [net(seed) for seed in range(3)]
    for number in (1, 2):
        for weight in alone[number].parameters():
            weight.requires_grad_(False)
    fasten().backward([alone[0], *nets[1:]], batch(), PLAN)
    for one, other in zip(nets[0].parameters(), alone[0].parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_divergence_from_the_mean_by_hand() -> None:
    same = torch.randn(4, 5)
    assert float(divergence_from_mean(same, same)) == pytest.approx(0, abs=1e-6)
    one, other = torch.tensor([[0.75, 0.25]]), torch.tensor([[0.25, 0.75]])
    assert float(divergence_from_mean(one.log(), other.log())) == pytest.approx(0.5 * math.log(4 / 3), abs=1e-6)
    assert not divergence_from_mean(same.requires_grad_(), same.detach()).requires_grad


def test_plain_epochs_come_first_and_remember_nothing() -> None:
    nets, one = [net(seed) for seed in range(3)], batch(step=15)
    method = fasten(baseline=0.5)
    method.backward(nets, one, PLAN)
    assert one.memory is not None
    assert not one.memory.any()
    assert [method.rate(step, PLAN) / PLAN.lr for step in (0, 8, 12, 16, 24, 28)] == pytest.approx(
        [1, 0.1, 0.01, 1, 0.1, 0.01]
    )


def test_invalid_options_are_refused() -> None:
    with pytest.raises(UsageError, match="--members must be at least 2, got 1"):
        fasten().check_plan(replace(PLAN, members=1))
    with pytest.raises(UsageError, match="baseline"):
        fasten(baseline=1).check_plan(PLAN)
    with pytest.raises(UsageError, match="no draw 'always'"):
        fasten(draw="always")
    with pytest.raises(UsageError, match="needs stored perturbations"):
        fasten().backward([net(0), net(1)], replace(batch(), memory=None), PLAN)
    assert not fasten(reuse=False).batch_needs.memory
    assert fasten(reuse=False).backward([net(0), net(1)], replace(batch(), memory=None), PLAN).isfinite()


def test_dverge_with_adversarial_training_is_dverge() -> None:
    fields = {"steps": 3, "layer": "2"}
    assert make_method("dverge+at", **fields).adversarial == 1
    whole = [name for name in dir(make_method("dverge")) if not name.startswith("_")]
    assert [name for name in dir(make_method("dverge+at")) if not name.startswith("_")] == whole
    one, two = make_method("dverge", adversarial=1), make_method("dverge+at")
    assert {name: getattr(one, name) for name in one.__dataclass_fields__} == {
        name: getattr(two, name) for name in two.__dataclass_fields__
    }
