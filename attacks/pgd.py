"""Projected gradient ascent (Madry et al. 2018, arXiv:1706.06083)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from robustkit import losses
from robustkit.goal import Goal
from robustkit.registry import attack
from robustkit.rng import RowRng
from robustkit.rows import Model, Rows, State, iterate
from robustkit.shapes import Images, Logits
from robustkit.threat import ThreatModel


@attack("pgd", paper="arXiv:1706.06083", norms=("linf", "l2", "l1"), access="gradient")
@dataclass(frozen=True, slots=True)
class PGD:
    """Steps along the gradient from random starts, each projected back; stops a sample once it is fooled.

    `step_size` is a fraction of eps. `density` matters in l1 alone: the share of coordinates that one step
    changes (SLIDE, arXiv:1904.13000). Gradients that point out of the [0, 1] box are left out of a step,
    which the paper does not do; in linf it changes nothing.
    """

    steps: int = 40
    step_size: float = 0.1
    restarts: int = 1
    loss: str = "ce"
    random_start: bool = True
    density: float = 0.01

    def __post_init__(self) -> None:
        """Refuse an unknown loss before anything runs."""
        losses.loss(self.loss)

    def __call__(self, model: Model, x: Images, goal: Goal, threat: ThreatModel, *, rng: RowRng) -> Images:
        """Return for each row its first success, else its point of highest loss."""
        return iterate(self, model, x, goal, threat, rng)

    def init(self, rows: Rows) -> State:
        """Return the starting points."""
        return {"x": rows.threat.random_start(rows.x, rows.rng) if self.random_start else rows.x}

    def step(self, rows: Rows, state: State, logits: Logits, gradient: Images) -> State:
        """Return the projected next points."""
        x = state["x"]
        blocked = ((x <= 0) & (gradient < 0)) | ((x >= 1) & (gradient > 0))
        direction = rows.threat.ascent(torch.where(blocked, 0, gradient), density=self.density)
        step = self.step_size * float(rows.threat.eps)
        return {"x": rows.threat.project(x + step * direction, rows.x)}
