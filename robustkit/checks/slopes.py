"""Compares a gradient with finite differences, and measures the error of the finite differences.

At a kink (equal pixels under max pooling, a ReLU at exactly 0, two classes with equal logits) a correct gradient
is one of several one-sided slopes, and central differences return another. Flat image areas put many units at a
kink at once, so the comparison is made at random points close to the images, where kinks have probability 0.
Large steps have errors by curvature and small ones by float rounding, so several step sizes are tried if the first
disagrees, and a disagreement counts only if it is larger than these two can explain.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from robustkit.attack_api import Answer
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images, PerRow

# Step sizes in pixel units, the one that suits most nets first.
STEPS = (1e-3, 1e-4, 1e-2, 1e-5)
# How far the points are from the images at most, per pixel.
JITTER = 1e-3
# The relative error up to which a gradient is correct: a quarter is far above the error by curvature.
TOLERANCE = 0.25
# A disagreement must be this many times that of the finite differences among themselves.
CONFIDENT = 3
# At the smallest step, where curvature is negligible, a change of this many roundings is not rounding error.
RESOLVED = 30

Loss = Callable[[Images], PerRow]


@dataclass(frozen=True)
class Agreement:
    """The `state` of a gradient is `right`, `wrong`, or `unknown` if finite differences are too inexact.

    `error` is its median relative error at the step size that decided, or at the best one.
    """

    state: str
    error: float


def compare(
    loss: Loss, x: Images, gradient: Images, direction: Images, size: PerRow, rounding: float
) -> Agreement:
    """Compare slopes along a direction.

    Args:
        loss: the function, (B C H W) to (B).
        x: points (B C H W).
        gradient: its gradient there, to be tested.
        direction: (B C H W), entries of -1, 0 and 1.
        size: a typical slope along such directions (B), to which errors are relative; 0 counts as 1e-30.
        rounding: the change of the loss that float rounding alone makes.
    """
    promised = (gradient * direction).flatten(1).sum(1).double()
    size = size.double().clamp(min=1e-30)
    slopes: dict[float, Tensor] = {}
    errors: dict[float, float] = {}
    for step in STEPS:
        change = loss(x + step * direction).double() - loss(x - step * direction).double()
        slopes[step] = change / (2 * step)
        errors[step] = _relative(slopes[step], promised, size)
        if errors[step] <= TOLERANCE:
            return Agreement("right", errors[step])
    ordered = sorted(STEPS)
    change = torch.maximum(slopes[ordered[0]].abs(), promised.abs()) * 2 * ordered[0]
    if float(change.median()) > RESOLVED * rounding:
        return Agreement("wrong", errors[ordered[0]])
    for one, other in itertools.pairwise(ordered):
        spread = _relative(slopes[one], slopes[other], size)
        noise = rounding / (2 * one) / float(size.median())
        error = min(errors[one], errors[other])
        if CONFIDENT * max(spread, noise) < error:
            return Agreement("wrong", error)
    return Agreement("unknown", min(errors.values()))


def _relative(one: PerRow, other: PerRow, size: PerRow) -> float:
    """Return the median of the differences, relative to the largest of the three, of which `size` is above 0."""
    return float(((one - other).abs() / torch.stack([one.abs(), other.abs(), size]).amax(0)).median())


def one_sided_error(there: Answer, ahead: PerRow, direction: Images, size: PerRow) -> float:
    """Return the median relative error of the gradient by the losses one step ahead along a direction.

    Args:
        there: loss and gradient at the points (B).
        ahead: the loss one step of STEPS[0] along the direction (B).
        direction: (B C H W), entries of -1, 0 and 1.
        size: a typical slope along such directions (B).
    """
    promised = (there.gradient * direction).flatten(1).sum(1).double()
    slope = (ahead.double() - there.loss.double()) / STEPS[0]
    return _relative(slope, promised, size.double().clamp(min=1e-30))


def nearby(x: Images, rng: RowRng, jitter: float = JITTER) -> Images:
    """Return random points close to the images, far enough inside the box for every step."""
    inside = max(STEPS) + JITTER
    noise = (jitter * (2 * rng.uniform(*x.shape[1:]) - 1)).to(x)
    if jitter > JITTER:
        return (x + noise).clamp(inside, 1 - inside)
    return x.clamp(inside, 1 - inside) + noise


def signs(x: Images, rng: RowRng) -> Images:
    """Return random directions of entries 1 and -1."""
    return torch.where(rng.uniform(*x.shape[1:]) < 0.5, -1.0, 1.0).to(x)
