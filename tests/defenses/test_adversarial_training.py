"""Methods that make single nets robust: losses by hand, closed forms on linear nets."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.core.errors import UsageError
from robustkit.core.rng import RowRng
from robustkit.defenses.adversarial_training.mart import boosted
from robustkit.registry import make_method
from robustkit.training.method import Batch, Plan

PLAN = Plan(samples=40, classes=3, batch_size=5, epochs=4, lr=0.05)


def batch(step: int = 0) -> Batch:
    x = 0.25 + 0.5 * torch.rand(5, 1, 3, 4, generator=torch.Generator().manual_seed(1))
    return Batch(x, torch.arange(5) % 3, RowRng(0, "method", torch.arange(5), step=step), step)


def linear() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))


class Recorded(nn.Module):
    """A linear net that keeps the images it was called on."""

    def __init__(self) -> None:
        super().__init__()
        self.net = linear()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        return self.net(x)


def test_mart_is_as_computed_by_hand() -> None:
    clean, attacked = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.2, 0.7, 0.1]]).log()
    apart = 0.5 * math.log(0.5 / 0.2) + 0.3 * math.log(0.3 / 0.7) + 0.2 * math.log(0.2 / 0.1)
    by_hand = -math.log(0.2) - math.log(1 - 0.7) + 5 * apart * (1 - 0.5)
    assert float(boosted(clean, attacked, torch.tensor([0]), 5.0)) == pytest.approx(by_hand, rel=1e-5)
    sure = torch.tensor([[0.0, 200.0, 0.0]], requires_grad=True)
    (slope,) = torch.autograd.grad(boosted(sure, sure, torch.tensor([0]), 5.0).sum(), sure)
    assert slope.isfinite().all()


def test_gradient_penalty_of_a_linear_net() -> None:
    """The gradient in the image is W^T (p - y)."""
    net, one = linear(), batch()
    loss = make_method("grad-reg", weight=2.0).backward([net], one, PLAN)
    with torch.no_grad():
        logits = net(one.x)
        slope = (logits.softmax(1) - F.one_hot(one.y, 3)) @ net[1].weight
        by_hand = F.cross_entropy(logits, one.y) + 2 * slope.square().sum(1).mean()
    assert float(loss) == pytest.approx(float(by_hand), rel=1e-5)


def test_fgsm_training_without_random_start_is_one_full_step() -> None:
    net, one = Recorded(), batch()
    make_method("fgsm-at", threat="linf:0.1", random_start=False, step_size=1.0).backward([net], one, PLAN)
    x = one.x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(net.net(x), one.y), x)
    torch.testing.assert_close(net.seen[-1], one.x + 0.1 * slope.sign())


def test_fast_adversarial_training_starts_at_random() -> None:
    net, one = Recorded(), batch()
    make_method("fgsm-at", threat="linf:0.1").backward([net], one, PLAN)
    assert not torch.equal(net.seen[0], one.x)
    assert ((net.seen[1] - one.x).abs() <= 0.1 + 1e-6).all()


def test_free_training_moves_images_between_passes_on_one_batch() -> None:
    method, net, one = make_method("free-at", threat="linf:0.1", repeats=3, step_size=0.5), Recorded(), batch()
    assert method.batch_needs.repeats == 3
    for _ in range(3):
        method.backward([net], one, PLAN)
    first, second, third = net.seen
    assert torch.equal(first, one.x)
    torch.testing.assert_close((second - one.x).abs(), torch.full_like(one.x, 0.05))
    torch.testing.assert_close((third - one.x).abs(), torch.full_like(one.x, 0.1))
    fresh = batch(1)
    method.backward([net], fresh, PLAN)
    assert torch.equal(net.seen[-1], fresh.x)


def test_ibp_trains_on_bounds_once_eps_has_grown() -> None:
    """Of a linear net the worst logits are the plain ones and eps times the rows' absolute sums."""
    method, net = make_method("ibp", threat="linf:0.1", warmup=0.0, ramp=0.5, certified=0.5), linear()
    plain = float(F.cross_entropy(net(batch().x), batch().y).detach())
    assert float(method.backward([net], batch(0), PLAN)) == pytest.approx(plain, rel=1e-5)
    one = batch(PLAN.steps - 1)
    own = F.one_hot(one.y, 3).bool()
    with torch.no_grad():
        reach = 0.1 * net[1].weight.abs().sum(1)
        logits = net(one.x)
        worst = float(F.cross_entropy(torch.where(own, logits - reach, logits + reach), one.y))
    assert float(method.backward([net], one, PLAN)) == pytest.approx((plain + worst) / 2, rel=1e-5)


def test_ibp_refuses_balls_that_are_no_boxes_and_nets_without_bounds() -> None:
    with pytest.raises(UsageError, match="must have the norm linf"):
        make_method("ibp", threat="l2:0.5")
    with pytest.raises(UsageError, match="do not pass through 'gelu'"):
        make_method("ibp").check_nets([nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.GELU())], batch().x[:1])
