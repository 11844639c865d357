"""MORA: one member is the plain ascent, copies are one net, weights by the formula, and what it is for."""

from __future__ import annotations

import math

import pytest
import torch

from robustkit.attack_api import Rows
from robustkit.core import criteria
from robustkit.core.criteria import Goal
from robustkit.core.errors import UsageError
from robustkit.core.rng import RowRng
from robustkit.core.threat import ThreatModel
from robustkit.registry import make

THREAT = ThreatModel.parse("linf:0.1")


def rows_of(labels, restart=0, targets=None):
    x = torch.full((len(labels), 2, 3, 5), 0.5)
    goal = Goal(labels, targets)
    rng = RowRng(0, "mora", torch.arange(len(labels)), restart=torch.full((len(labels),), restart))
    return Rows(x, goal, THREAT, rng, goal)


def slope(stack, labels, restart=0, **fields):
    stack = stack.clone().requires_grad_()
    attack = make("mora", **fields)
    value = attack.objective(rows_of(labels, restart), {}, stack)
    return value, torch.autograd.grad(value.sum(), stack)[0]


def draw(n=3, k=5, rows=7, seed=0):
    stack = torch.randn(rows, n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    labels = stack.softmax(2).mean(1).argmax(1)
    return stack, labels


def test_without_members_share_it_is_cross_entropy_of_the_ensemble_over_its_gap() -> None:
    """Restart 1 has lambda = 0."""
    stack, labels = draw()
    whole = stack.log_softmax(2).logsumexp(1) - math.log(3)
    top = whole.topk(2).values
    expected = criteria.ce(whole / (top[:, :1] - top[:, 1:]), labels)
    torch.testing.assert_close(slope(stack, labels, restart=1)[0], expected)


@pytest.mark.parametrize("combine", ["probabilities", "logits", "vote"])
@pytest.mark.parametrize("restart", range(5))
def test_copies_of_one_net_are_that_net(combine, restart) -> None:
    """The gradient in the net's logits has one direction, however many copies there are."""
    stack, labels = draw(n=1)
    one = slope(stack, labels, restart, combine=combine)[1].sum(1)
    three = slope(stack.expand(-1, 3, -1), labels, restart, combine=combine)[1].sum(1)
    torch.testing.assert_close(one, three)
    assert one.abs().sum(1).gt(0).all()


def test_weights_follow_the_formula_and_fooled_members_have_none() -> None:
    """By hand for two members and three classes."""
    stack = torch.tensor([[[2.0, 1.0, 0.0], [0.0, 1.0, 0.5]]], dtype=torch.float64)
    labels = torch.tensor([0])
    sharp, mean = (0.2 * stack).softmax(2), stack.softmax(2).mean(1)
    rival = 1
    first = sharp[0, 0, rival] * (sharp[0, 0, 0] / mean[0, 0] + (1 - sharp[0, 0, rival]) / mean[0, rival])
    attack = make("mora")
    weights = attack._weights(stack, stack, labels, torch.tensor([rival]))
    torch.testing.assert_close(weights, torch.stack([first, first * 0])[None])


def test_a_confidently_wrong_member_does_not_stop_the_others() -> None:
    """The mean of probabilities has no slope there; MORA has."""
    stack = torch.tensor([[[60.0, 0.0, 1.0], [50.0, 0.0, 2.0], [0.0, 90.0, 0.0]]])
    labels = torch.tensor([0])
    _, pull = slope(stack, labels, restart=4)
    assert pull[0, :2].abs().sum() > 1e-3
    plain = stack.clone().requires_grad_()
    whole = criteria.ce(plain.log_softmax(2).logsumexp(1), labels)
    assert torch.autograd.grad(whole.sum(), plain)[0][0, :2].abs().sum() < 1e-6


def test_targeted_attacks_move_towards_the_target_and_unknown_options_are_refused() -> None:
    stack, labels = draw()
    targets = (labels + 1) % 5
    point = stack.clone().requires_grad_()
    value = make("mora-t").objective(rows_of(labels, targets=targets), {}, point)
    pull = torch.autograd.grad(value.sum(), point)[0].sum(1)
    assert (pull.gather(1, targets[:, None]) > 0).all()
    with pytest.raises(UsageError, match="combine"):
        make("mora", combine="mean")


def test_targeted_attacks_use_mean_logits_only() -> None:
    """A.10: lambda = 0 in that mode, and a half in the others."""
    stack, labels = draw()
    goal = rows_of(labels, targets=(labels + 1) % 5)
    for combine, alone in (("logits", True), ("probabilities", False)):
        attack = make("mora-t", combine=combine)
        whole = attack._whole(stack)
        top = whole.topk(2).values
        expected = -criteria.ce(whole / (top[:, :1] - top[:, 1:]), goal.aim.targets)
        assert torch.allclose(attack.objective(goal, {}, stack), expected) is alone
