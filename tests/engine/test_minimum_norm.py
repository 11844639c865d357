"""Minimum norms: against closed forms, and what is promised of the points."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import robustkit
from robustkit.errors import UsageError
from robustkit.threat import ThreatModel

NORMS = ("linf", "l2", "l1")


class Planes(nn.Module):
    """Logits linear in the image, without a matrix product, whose rounding depends on the batch."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x):
        return ((x - 0.5).flatten(1)[:, None] * self.weight).sum(2)


def exact(weight, x, labels, norm):
    """Return the distances (B) of the nearest images in [0, 1] that another class takes."""
    found = []
    for image, label in zip(x.flatten(1).double(), labels.tolist(), strict=True):
        logits = weight.double() @ (image - 0.5)
        far = []
        for other in set(range(len(weight))) - {label}:
            slope = (weight[other] - weight[label]).double()
            gap = logits[label] - logits[other]
            room, size = torch.where(slope > 0, 1 - image, image), slope.abs()
            if norm == "l1":
                order = size.argsort(descending=True)
                gained = (size * room)[order].cumsum(0)
                if gained[-1] < gap:
                    continue
                last = int((gained < gap).sum())
                rest = gap - (gained[last - 1] if last else 0)
                far.append(float(room[order][:last].sum() + rest / size[order][last]))
                continue
            rate = torch.ones_like(size) if norm == "linf" else size
            low, high = 0.0, 1e6
            if (size * room).sum() < gap:
                continue
            for _ in range(100):
                middle = (low + high) / 2
                moved = torch.minimum(middle * rate, room)
                low, high = (low, middle) if (size * moved).sum() >= gap else (middle, high)
            moved = torch.minimum(high * rate, room)
            far.append(float(moved.max() if norm == "linf" else moved.norm()))
        found.append(min(far, default=np.inf))
    return torch.tensor(found, dtype=torch.float64)


def problem(shape, classes, seed):
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, shape[1] * shape[2] * shape[3], generator=draw)
    x = torch.rand(shape, generator=draw)
    model = Planes(weight)
    return model, x, model(x).argmax(1)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("shape", "classes"), [((5, 3, 4, 6), 4), ((7, 1, 6, 5), 2)], ids=["rgb", "grey"])
def test_distances_of_linear_models_are_exact(shape, classes, norm):
    """The box is active: a random image has pixels near its ends."""
    model, x, y = problem(shape, classes, seed=3)
    found = robustkit.minimum_norm(model, x, y, norm)
    truth = exact(model.weight, x, y, norm)
    assert (found.distance >= truth * (1 - 1e-6)).all()
    assert (found.distance <= truth * 1.01).all()
    assert (model(found.x).argmax(1) != y).all()
    assert ((found.x >= 0) & (found.x <= 1)).all()
    assert torch.equal(found.distance, ThreatModel.parse(f"{norm}:min").distance(found.x, x))


def test_images_that_are_wrong_are_at_no_distance_and_others_may_have_none():
    model, x, y = problem((4, 3, 2, 5), 3, seed=1)
    wrong = (y + torch.tensor([1, 0, 1, 0])) % 3
    found = robustkit.minimum_norm(model, x, wrong, "l2", attack="ddn(steps=20)")
    assert found.distance[[0, 2]].tolist() == [0, 0]
    assert torch.equal(found.x[[0, 2]], x[[0, 2]])
    assert (found.attack[0], found.attack[1]) == ("clean", "ddn")
    constant = robustkit.minimum_norm(lambda x: x.flatten(1)[:, :3] * 0 + torch.arange(3), x, y * 0 + 2, "l2")
    assert constant.distance.isinf().all()
    assert constant.attack == [None] * 4
    assert torch.equal(constant.x, x)


@pytest.mark.parametrize("attack", ["pgd", "fmn@mean-logit", "fmn?", "fnm"])
def test_attacks_that_find_no_minimum_are_one_sentence(attack):
    model, x, y = problem((2, 1, 3, 4), 3, seed=1)
    with pytest.raises(UsageError, match=r"^[^\n]+\.$"):
        robustkit.minimum_norm(model, x, y, "l2", attack=attack)
