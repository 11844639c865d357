"""Methods that DVERGE is compared with, against values computed by hand and known errors of other code."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.core.errors import UsageError
from robustkit.core.rng import RowRng
from robustkit.core.threat import ThreatModel
from robustkit.defenses.diversity.adp import entropy, volume
from robustkit.defenses.diversity.gal import coherence
from robustkit.registry import make_method
from robustkit.training import ensemble_utils
from robustkit.training.method import Batch, Plan

PLAN = Plan(samples=64, classes=4, batch_size=8, epochs=4, lr=0.05, members=3)


def net(seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten(), nn.Linear(140, 4))


def batch(step: int = 0) -> Batch:
    x = torch.rand(8, 3, 7, 9, generator=torch.Generator().manual_seed(1))
    return Batch(x, torch.arange(8) % 4, RowRng(0, "method", torch.arange(8), step=step), step)


def test_adp_is_as_computed_by_hand() -> None:
    """A.6."""
    logits = torch.tensor([[[0.7, 0.2, 0.1]], [[0.7, 0.1, 0.2]]]).log()
    label = torch.tensor([0])
    cross = sum(float(F.cross_entropy(one, label)) for one in logits)
    assert cross == pytest.approx(0.713350, abs=1e-5)
    assert float(entropy(logits)) == pytest.approx(0.818808, abs=1e-5)
    assert float(volume(logits, label)) == pytest.approx(-1.021646, abs=1e-5)

    class Fixed(nn.Module):
        def __init__(self, logits: Tensor) -> None:
            super().__init__()
            self.logits = nn.Parameter(logits)

        def forward(self, x: Tensor) -> Tensor:
            return self.logits.expand(len(x), -1)

    nets = [Fixed(one[0]) for one in logits]
    one = replace(batch(), x=batch().x[:1], y=label)
    loss = make_method("adp").backward(nets, one, replace(PLAN, members=2, classes=3))
    assert 2 * float(loss) == pytest.approx(-0.413444, abs=1e-5)


def test_adp_is_finite_if_members_are_certain() -> None:
    """Probabilities of wrong classes underflow, their directions do not."""
    logits = torch.tensor([[[300.0, 0.0, 1.0]], [[300.0, 1.0, 0.0]]], requires_grad=True)
    value = volume(logits, torch.tensor([0]))
    (slope,) = torch.autograd.grad(value, logits)
    assert value.isfinite()
    assert slope.isfinite().all()
    assert slope.abs().sum() > 0
    with pytest.raises(UsageError, match="wrong classes"):
        make_method("adp").check_plan(replace(PLAN, members=4))


def test_adp_is_finite_if_members_are_equal() -> None:
    """What equal members span is nothing but the 1e-6 on the diagonal."""
    for count in (2, 3, 8):
        one = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
        noise = 1e-6 * torch.randn(count, 64, 10, generator=torch.Generator().manual_seed(1))
        for logits in (one.expand(count, -1, -1), one + noise):
            value = volume(logits, torch.arange(64) % 10)
            assert float(value) == pytest.approx((count - 1) * math.log(1e-6) + math.log(count), abs=0.5)


def test_coherence_of_equal_and_of_orthogonal_gradients() -> None:
    """A.6; also of gradients whose squares underflow."""
    same = torch.tensor([[1.0, 2.0, 3.0]]).expand(3, 1, 3)
    for size in (1.0, 1e-30):
        assert float(coherence(same * size)) == pytest.approx(math.log(3) + 1, abs=1e-5)
        assert float(coherence(torch.eye(2)[:, None] * size)) == pytest.approx(0, abs=1e-6)
        assert float(coherence(torch.eye(3)[:, None] * size)) == pytest.approx(math.log(3), abs=1e-6)


@pytest.mark.parametrize("name", ["adp", "gal", "trs", "dverge"])
def test_one_member_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="--members must be at least 2, got 1"):
        make_method(name).check_plan(replace(PLAN, members=1))


def test_coherence_is_differentiable_through_input_gradients() -> None:
    """GAL's and TRS's penalties reach the weights: without the cross-entropy's part something is left."""
    for name, off in (("gal", {"weight": 0.0}), ("trs", {"scale": 0.0})):
        found = []
        for fields in (off, {}):
            nets = [net(seed) for seed in range(3)]
            make_method(name, **fields).backward(nets, batch(), PLAN)
            found.append(
                [weight.grad.clone() for one in nets for weight in one.parameters() if weight.grad is not None]
            )
        assert len(found[0]) == len(found[1]) == 18
        assert not torch.allclose(found[0][0], found[1][0], atol=1e-6)


@pytest.mark.parametrize("count", [2, 4])
def test_trs_equals_the_authors_sum_for_any_number_of_members(count: int) -> None:
    """A.6: mean |cosine| of all pairs, twice the mean squared length; all pairs, and means over all members."""
    method, one, plan = make_method("trs", steps=2), batch(), replace(PLAN, members=count)
    members, others = ([net(seed) for seed in range(count)] for _ in range(2))
    found = float(method.backward(members, one, plan))
    steep = method._steepest(others, one, plan)
    assert torch.equal(steep[:4], one.x[:4])
    slopes, squares, cross = [], [], 0.0
    for other in others:
        point, up = one.x.clone().requires_grad_(), steep.clone().requires_grad_()
        loss = F.cross_entropy(other(point), one.y)
        cross += float(loss.detach())
        slopes.append(torch.autograd.grad(loss, point)[0].flatten(1))
        squares.append(torch.autograd.grad(F.cross_entropy(other(up), one.y), up)[0].flatten(1).square().sum(1))
    pairs = [(i, j) for i in range(count) for j in range(i)]
    apart = torch.stack([F.cosine_similarity(slopes[i], slopes[j]).abs() for i, j in pairs]).mean()
    expected = cross + 5 * (2 * float(apart) + 2 * 2 * float(torch.stack(squares).mean()))
    assert count * found == pytest.approx(expected, rel=1e-5)


def test_trs_searches_new_adversarial_points_at_each_step() -> None:
    """The authors' ascent adds the gradients of all steps up; here the last step goes by its own."""
    models, one = [net(seed) for seed in range(2)], batch()
    last, before = (make_method("trs", steps=steps)._steepest(models, one, PLAN)[4:] for steps in (3, 2))
    point = before.clone().requires_grad_()
    slopes = [
        torch.autograd.grad(F.cross_entropy(model(point), one.y[4:]), point, create_graph=True)[0]
        for model in models
    ]
    (slope,) = torch.autograd.grad(sum((each.square().sum() for each in slopes), start=point.new_zeros(())), point)
    expected = (before + 0.1 / 3 * slope.sign()).clamp(one.x[4:] - 0.1, one.x[4:] + 0.1).clamp(0, 1)
    assert float(((last - expected).abs() < 1e-6).float().mean()) > 0.99
    assert all(weight.grad is None for model in models for weight in model.parameters())


def test_ascent_stays_in_the_ball_and_raises_the_loss() -> None:
    one, threat = batch(), ThreatModel.parse("linf:8/255")
    with ensemble_utils.batch_norm_policy([model := net(0)], "frozen"):
        start = ensemble_utils.random_start(one.x, threat, one.rng)

        def loss(x: Tensor) -> Tensor:
            return F.cross_entropy(model(x), one.y, reduction="none")

        found = ensemble_utils.ascend(loss, start, one.x, threat, steps=10, step_size=0.25)
        assert (loss(found) > loss(one.x)).all()
    assert threat.contains(found, one.x).all()
    assert not found.requires_grad
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("name", ["pgd-at", "trades"])
def test_attacked_images_leave_running_statistics_to_the_update(name: str) -> None:
    """Two passes of an update at most move them, whatever the number of steps."""
    model = net(0)
    make_method(name).backward([model], batch(), replace(PLAN, members=1))
    assert int(model.get_buffer("1.num_batches_tracked")) == (1 if name == "pgd-at" else 2)


def test_trades_at_eps_zero_is_plain_training() -> None:
    one, two = net(0), net(0)
    loss = make_method("trades", beta=0.0, steps=1).backward([one], batch(), PLAN)
    assert float(loss) == pytest.approx(float(F.cross_entropy(two(batch().x), batch().y).detach()), rel=1e-5)
