"""Diagnoses of the input gradient: missing, zero, vanishing, or not that of the function."""

from __future__ import annotations

import torch

from robustkit.checks.probe import Probe
from robustkit.goal import Goal
from robustkit.record import Flag
from robustkit.rows import query

VANISHING = 1e-7
MOST = 0.75
STEPS = (1e-3, 3e-3, 1e-2)


def zero(probe: Probe) -> Flag | None:
    """Images at which the margin's gradient is exactly zero."""
    gone = _sizes(probe, "margin") == 0
    if not gone.any():
        return None
    return Flag(
        "zero-gradient",
        "warning",
        int(gone.sum()),
        f"of {len(gone)} images have an input gradient of exactly zero: gradient attacks cannot move them",
        "judge by score-based attacks, or give a differentiable version of the model",
    )


def vanishing(probe: Probe) -> Flag | None:
    """Images at which cross-entropy's gradient is tiny beside the margin's."""
    ce, margin = _sizes(probe, "ce"), _sizes(probe, "margin")
    gone = (ce < VANISHING * margin) & (margin > 0)
    if not len(gone) or gone.float().mean() <= MOST:
        return None
    return Flag(
        "vanishing-gradient",
        "warning",
        int(gone.sum()),
        f"of {len(gone)} images have a cross-entropy gradient below 1e-7 of the margin's: the model is so sure "
        "that cross-entropy attacks stall",
        "rely on attacks with a margin or dlr loss; check for a temperature or a softmax inside the model",
    )


def disagrees(probe: Probe) -> Flag | None:
    """A gradient that does not predict what the function does along it.

    Compares the slope along the gradient's sign with central differences at three step sizes; the nearest counts,
    and half of the images must be off by more than half: kinks of honest nets stay far below.
    """
    size = _sizes(probe, "margin")
    rows = probe.few[size > 0]
    if not len(rows):
        return None
    gradient = probe.gradients["margin"][size > 0]
    direction = gradient.sign()
    promised = (gradient * direction).flatten(1).sum(1)
    goal = Goal(probe.labels[rows])
    errors = []
    for step in STEPS:
        ahead, behind = (
            query(probe.model, probe.x[rows] + sign * step * direction, goal, "margin", False)[1]
            for sign in (1, -1)
        )
        errors.append(((ahead - behind) / (2 * step) / promised - 1).abs())
    error = torch.stack(errors).amin(0)
    typical = float(error.median())
    if typical <= 0.5:
        return None
    return Flag(
        "wrong-gradient",
        "warning",
        round(typical, 4),
        "is the median relative error of the gradient against finite differences: it is not that of the function "
        "(quantisation, a straight-through estimate, shattered gradients)",
        "attack a smooth version of the model and judge on this one; look at what score-based attacks find",
    )


def _sizes(probe: Probe, loss: str) -> torch.Tensor:
    return probe.gradients[loss].flatten(1).abs().amax(1) if len(probe.few) else torch.zeros(0)
