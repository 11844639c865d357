"""The losses and the goal: closed forms, every class count, always rising to success."""

from __future__ import annotations

import math

import pytest
import torch

from robustkit.core.criteria import LOSSES, Goal, ce, dlr, loss, margin
from robustkit.core.errors import UsageError

COUNTS = (2, 3, 4, 5, 10)
B = 64


def problem(classes, seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(B, classes, generator=draw, dtype=dtype)
    labels = torch.randint(classes, (B,), generator=draw)
    targets = (labels + torch.randint(1, classes, (B,), generator=draw)) % classes
    return logits, labels, targets


@pytest.mark.parametrize("classes", COUNTS)
@pytest.mark.parametrize("targeted", [False, True])
def test_closed_forms(classes, targeted):
    logits, labels, targets = problem(classes)
    towards = targets if targeted else None
    for i, row in enumerate(logits.tolist()):
        label, target = labels[i].item(), targets[i].item()
        total = math.log(sum(math.exp(value) for value in row))
        others = [value for k, value in enumerate(row) if k != label]
        entropy = row[target] - total if targeted else total - row[label]
        ahead = (row[target] if targeted else max(others)) - row[label]
        first, *rest = sorted(row, reverse=True)
        if classes == 2:
            gap = 1.0
        elif targeted:
            gap = first - (rest[0] + rest[1] if classes == 3 else rest[1] + rest[2]) / 2
        else:
            gap = first - rest[1]
        one = (logits[i : i + 1], labels[i : i + 1], targets[i : i + 1] if targeted else None)
        assert ce(*one).item() == pytest.approx(entropy)
        assert margin(*one).item() == pytest.approx(ahead)
        assert dlr(*one).item() == pytest.approx(ahead / gap, rel=1e-6)
    for function in LOSSES.values():
        values = function(logits, labels, towards)
        assert values.shape == (B,)
        assert values.dtype == logits.dtype


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("classes", COUNTS)
@pytest.mark.parametrize("targeted", [False, True])
def test_each_rises_to_success(name, classes, targeted):
    logits, labels, targets = problem(classes, seed=1)
    goal = Goal(labels, targets if targeted else None)
    rows = torch.arange(B)
    raised, lowered = logits.clone(), logits.clone()
    # Untargeted: lower the label itself. Targeted: raise the target.
    (raised if targeted else lowered)[rows, targets if targeted else labels] += 0.1 if targeted else -0.1
    better = raised if targeted else lowered
    gain = goal.loss(better, name) - goal.loss(logits, name)
    behind = ~goal.reached(logits)
    assert (gain[behind] >= -1e-12).all()
    assert (gain[behind] > 1e-9).all()
    if name != "ce":
        assert torch.equal(goal.loss(logits, name) > 0, logits.argmax(1) != labels) or targeted


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("classes", COUNTS)
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("case", ["usual", "all equal", "top three equal", "huge"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_finite_and_logits_untouched(name, classes, targeted, case, dtype):
    logits, labels, targets = problem(classes, seed=2, dtype=dtype)
    if case == "all equal":
        logits = torch.zeros_like(logits)
    elif case == "top three equal":
        logits[:, :3] = 50
    elif case == "huge":
        logits = logits * 1e6
    logits.requires_grad_()
    before = logits.detach().clone()
    values = Goal(labels, targets if targeted else None).loss(logits, name)
    values.sum().backward()
    assert values.isfinite().all()
    assert logits.grad.isfinite().all()
    assert torch.equal(logits.detach(), before)


@pytest.mark.parametrize("name", LOSSES)
def test_rows_do_not_mix(name):
    logits, labels, targets = problem(5)
    whole = loss(name)(logits, labels, targets)
    parts = torch.cat([loss(name)(logits[i : i + 1], labels[i : i + 1], targets[i : i + 1]) for i in range(B)])
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("classes", [3, 4, 5, 10])
def test_dlr_is_pyautoattacks(classes):
    from pyautoattack.autopgd_base import APGDAttack

    logits, labels, _ = problem(classes, seed=3)
    official = APGDAttack(torch.nn.Identity(), eps=0.1, device="cpu")
    torch.testing.assert_close(dlr(logits, labels), official.dlr_loss(logits, labels), rtol=1e-9, atol=0)


@pytest.mark.parametrize("classes", [4, 5, 10])
def test_targeted_dlr_is_pyautoattacks(classes):
    from pyautoattack.autopgd_base import APGDAttack_targeted

    logits, labels, targets = problem(classes, seed=4)
    official = APGDAttack_targeted(torch.nn.Identity(), eps=0.1, device="cpu")
    official.y_target = targets
    theirs = official.dlr_loss_targeted(logits, labels)
    torch.testing.assert_close(dlr(logits, labels, targets), theirs, rtol=1e-9, atol=0)


def test_unknown_loss_names_the_nearest():
    with pytest.raises(UsageError, match="Did you mean 'margin'"):
        loss("margn")


def test_reached():
    nan, inf = math.nan, math.inf
    logits = torch.tensor([[2.0, 1, 0], [1, 2, 0], [0, 1, 2], [nan, 1, 0], [0, nan, 0], [1, inf, 0], [nan] * 3])
    labels = torch.zeros(7, dtype=torch.int64)
    assert Goal(labels).reached(logits).tolist() == [False, True, True, False, False, True, False]
    targets = torch.ones(7, dtype=torch.int64)
    assert Goal(labels, targets).reached(logits).tolist() == [False, True, False, False, False, True, False]


def test_select_by_position_and_mask():
    goal = Goal(torch.tensor([3, 1, 2]), torch.tensor([0, 0, 1]))
    for index in (torch.tensor([2, 0]), torch.tensor([True, False, True])):
        part = goal.select(index)
        assert torch.equal(part.labels, goal.labels[index])
        assert part.targets is not None
        assert torch.equal(part.targets, goal.targets[index])
    assert Goal(goal.labels).select(torch.tensor([0])).targets is None
