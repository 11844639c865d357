"""Decoupled direction and norm (Rony et al. 2019, arXiv:1811.09600)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from robustkit.attack_api import Answer, LoopOptions, Rows, RowWise, State
from robustkit.core import criteria
from robustkit.core.threat import per_row
from robustkit.registry import attack
from robustkit.registry.ranges import Count, Positive, ShareBelowOne


@attack("ddn", paper="arXiv:1811.09600", norms=("l2",), access="gradient", minimal=True)
@dataclass(frozen=True, slots=True)
class DDN(RowWise):
    """Gradient steps on a sphere that shrinks from adversarial points and grows from others; ends within eps.

    `radius` is the first sphere's, in pixel units; `gamma` the share by which it changes at each step.
    Departures from the paper: images are not rounded to 256 levels; a point whose gradient is zero moves in a
    random direction, as in foolbox; the paper does not define this case.
    """

    steps: Count = 100
    restarts: Count = 1
    loss: str = "ce"
    radius: Positive = 1.0
    gamma: ShareBelowOne = 0.05

    def __post_init__(self) -> None:
        """Raise UsageError for an unknown loss."""
        criteria.loss(self.loss)

    def loop_options(self, norm: str) -> LoopOptions:
        """Return the loop's options; queries may lie outside the threat."""
        return LoopOptions(self.steps, restarts=self.restarts, queries_outside_ball=True)

    def init(self, rows: Rows) -> State:
        """Return the clean images, or random starts."""
        first = torch.full((len(rows.x),), self.radius, dtype=torch.float64, device=rows.x.device)
        x = rows.x
        if self.restarts > 1:
            later = torch.as_tensor(rows.rng.restart, device=x.device).expand(len(x)) > 0
            x = torch.where(per_row(later, x), rows.random_start(), x)
        return {"x": x, "radius": first, "clock": torch.zeros_like(first, dtype=torch.int64)}

    def step(self, rows: Rows, state: State, answer: Answer) -> State:
        """Return the points of the next sphere, clipped to the box."""
        x, gradient = rows.x, answer.gradient.double()
        zero = per_row((gradient == 0).flatten(1).all(1), gradient)
        gradient = torch.where(zero, rows.rng.normal(*x.shape[1:]).double(), gradient)
        share = (1 + torch.cos(math.pi * state["clock"].double() / self.steps)) / 2
        crossed = rows.goal.reached(answer.logits)
        widest = rows.threat.distance((x < 0.5).to(x.dtype), x)
        radius = torch.minimum(state["radius"] * torch.where(crossed, 1 - self.gamma, 1 + self.gamma), widest)
        shift = state["x"].double() - x + per_row(0.01 + 0.99 * share, x) * rows.threat.ascent(gradient)
        scale = radius / shift.flatten(1).norm(dim=1).clamp(min=1e-300)
        return {
            "x": (x + (per_row(scale, x) * shift)).clamp(0, 1).to(x.dtype),
            "radius": radius,
            "clock": state["clock"] + 1,
        }
