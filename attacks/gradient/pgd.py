"""Projected gradient ascent (Madry et al. 2018, arXiv:1706.06083)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from robustkit.attack_api import Answer, Rows, RowWise, State
from robustkit.core import criteria
from robustkit.core.step_size import StepSize
from robustkit.registry import attack
from robustkit.registry.ranges import Count, Share


@attack("pgd", paper="arXiv:1706.06083", norms=("linf", "l2", "l1"), access="gradient", ascent=True)
@dataclass(frozen=True, slots=True)
class PGD(RowWise):
    """Steps along the gradient from random starts, each projected back; stops a sample once it is fooled.

    On surrogates (`robustkit craft`) it takes all steps; of `restarts` the last one that fools them counts, or
    else the first. `step_size` is `0.25eps` or `2/255px` (none: 2.5 eps / steps). `density` applies to l1 only:
    the share of coordinates that one step changes (SLIDE, arXiv:1904.13000), more if the box [0, 1] stops them. A
    step ignores gradients that point out of the box, which the paper does not do; in linf this changes nothing.
    """

    steps: Count = 40
    step_size: StepSize | None = None
    restarts: Count = 1
    loss: str = "ce"
    random_start: bool = True
    density: Share = 0.01

    def __post_init__(self) -> None:
        """Raise UsageError for an unknown loss."""
        criteria.loss(self.loss)

    def init(self, rows: Rows) -> State:
        """Return the starting points."""
        return {"x": rows.threat.random_start(rows.x, rows.rng) if self.random_start else rows.x}

    def step(self, rows: Rows, state: State, answer: Answer) -> State:
        """Return the projected next points."""
        x, gradient = state["x"], answer.gradient
        length = (self.step_size or StepSize(2.5 / self.steps)).length(float(rows.threat.eps))
        if rows.threat.norm != "linf":
            blocked = ((x <= 0) & (gradient < 0)) | ((x >= 1) & (gradient > 0))
            gradient = torch.where(blocked, 0, gradient)
        return {"x": rows.project(rows.threat.step(x, gradient, length, density=self.density))}
