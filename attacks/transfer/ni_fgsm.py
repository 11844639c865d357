"""Iterative gradient sign with Nesterov's look ahead (Lin et al. 2020, arXiv:1908.06281)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from robustkit.attack_api import Answer, Model, Rows, State, ascend, mean_normalised
from robustkit.core import criteria
from robustkit.core.criteria import Goal
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images
from robustkit.core.step_size import StepSize
from robustkit.core.threat import ThreatModel
from robustkit.registry import attack
from robustkit.registry.ranges import Count, Share


@attack("ni-fgsm", paper="arXiv:1908.06281", norms=("linf", "l2"), access="gradient", ascent=True)
@dataclass(frozen=True, slots=True)
class NIFGSM:
    """As `mi-fgsm`, with each gradient taken at the point that the momentum alone would reach; takes all steps.

    `step_size` is `0.1eps` or `2/255px` (none: the paper's eps / steps); `momentum` is the share of the sum that
    each step keeps. In linf the look ahead is the paper's, step size times momentum times the sum of L1-normalised
    gradients, here of mean size 1 a pixel.
    """

    steps: Count = 10
    step_size: StepSize | None = None
    momentum: Share = 1.0
    loss: str = "ce"

    def __post_init__(self) -> None:
        """Raise UsageError for an unknown loss."""
        criteria.loss(self.loss)

    def __call__(self, model: Model, x: Images, goal: Goal, threat: ThreatModel, *, rng: RowRng) -> Images:
        """Return the last points."""
        return ascend(self, model, x, goal, threat, rng)

    def init(self, rows: Rows) -> State:
        """Return the clean images, with velocity zero."""
        return {"x": rows.x, "point": rows.x, "velocity": torch.zeros_like(rows.x)}

    def step(self, rows: Rows, state: State, answer: Answer) -> State:
        """Return the projected next points, and the points ahead of them."""
        size = (self.step_size or StepSize(1 / self.steps)).length(float(rows.threat.eps))
        velocity = self.momentum * state["velocity"] + mean_normalised(answer.gradient)
        point = rows.project(state["point"] + size * rows.threat.ascent(velocity))
        return {"x": point + size * self.momentum * velocity, "point": point, "velocity": velocity}
