"""Iterative gradient sign with momentum (Dong et al. 2018, arXiv:1710.06081)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from robustkit.attack_api import Answer, Rows, RowWise, State
from robustkit.core import criteria
from robustkit.core.step_size import StepSize
from robustkit.core.threat import per_row
from robustkit.registry import attack
from robustkit.registry.ranges import Count, Share


@attack("mi-fgsm", paper="arXiv:1710.06081", norms=("linf", "l2"), access="gradient", ascent=True)
@dataclass(frozen=True, slots=True)
class MIFGSM(RowWise):
    """Steps along a decaying sum of normalised gradients, from the clean image; the base of transfer attacks.

    `step_size` is `0.1eps` or `2/255px` (none: the paper's eps / steps); `momentum` is the share of the sum that
    each step keeps. Points are projected onto ball and box; the paper's l2 version scales and does not clip.
    """

    steps: Count = 10
    step_size: StepSize | None = None
    momentum: Share = 1.0
    loss: str = "ce"

    def __post_init__(self) -> None:
        """Raise UsageError for an unknown loss."""
        criteria.loss(self.loss)

    def init(self, rows: Rows) -> State:
        """Return the clean images, with velocity zero."""
        return {"x": rows.x, "velocity": torch.zeros_like(rows.x)}

    def step(self, rows: Rows, state: State, answer: Answer) -> State:
        """Return the projected next points."""
        total = answer.gradient.flatten(1).abs().sum(1)
        gradient = answer.gradient / per_row(torch.where(total > 0, total, 1), answer.gradient)
        velocity = self.momentum * state["velocity"] + gradient
        size = (self.step_size or StepSize(1 / self.steps)).length(float(rows.threat.eps))
        moved = state["x"] + size * rows.threat.ascent(velocity)
        return {"x": rows.project(moved), "velocity": velocity}
