"""Fast minimum-norm attack (Pintor et al. 2021, arXiv:2102.12827)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from robustkit.attack_api import Answer, LoopOptions, Rows, RowWise, State
from robustkit.core.errors import UsageError
from robustkit.core.step_size import StepSize
from robustkit.core.threat import per_row
from robustkit.registry import attack
from robustkit.registry.ranges import Count, ShareBelowOne

DUAL = {"linf": 1.0, "l2": 2.0, "l1": math.inf}


@attack("fmn", paper="arXiv:2102.12827", norms=("linf", "l2", "l1"), access="gradient", minimal=True)
@dataclass(frozen=True, slots=True)
class FMN(RowWise):
    """Gradient steps in a ball whose radius follows the distance of the decision boundary; ends within eps.

    `step_size` is the first step's l2 length and falls to a hundredth of it; `gamma` is the relative change of the
    radius at first. Departures from the paper: points are projected onto ball and box together, while it clips to
    the box afterwards; the radius that reaches the linearised boundary is multiplied by 1 + gamma, because on a
    linear net the paper's radius ends just before the boundary; each restart after the first begins at a random
    point of the threat.
    """

    steps: Count = 100
    restarts: Count = 1
    step_size: StepSize = StepSize(1.0, "px")
    gamma: ShareBelowOne = 0.05

    def __post_init__(self) -> None:
        """Raise UsageError for a step size in shares of eps, whose norm may be another one."""
        if self.step_size.unit != "px":
            raise UsageError(f"fmn: step_size={self.step_size} must be an l2 length in pixel units, e.g. 1px.")

    @property
    def loss(self) -> str:
        """The loss: the difference of logits."""
        return "margin"

    def loop_options(self, norm: str) -> LoopOptions:
        """Return the loop's options; queries may lie outside the threat."""
        return LoopOptions(self.steps, restarts=self.restarts, queries_outside_ball=True)

    def init(self, rows: Rows) -> State:
        """Return the clean images, or random starts; no radius yet, no success."""
        infinite = torch.full((len(rows.x),), math.inf, dtype=torch.float64, device=rows.x.device)
        x = rows.x
        if self.restarts > 1:
            restarted = torch.as_tensor(rows.rng.restart, device=x.device).expand(len(x)) > 0
            x = torch.where(per_row(restarted, x), rows.random_start(), x)
        return {
            "x": x,
            "radius": infinite,
            "nearest": infinite,
            "clock": torch.zeros_like(infinite, dtype=torch.int64),
        }

    def step(self, rows: Rows, state: State, answer: Answer) -> State:
        """Return the next radius by the linearised boundary, and a gradient step within it."""
        x, gradient = rows.x, answer.gradient
        share = (1 + torch.cos(math.pi * state["clock"].double() / self.steps)) / 2
        gamma = 0.001 + (self.gamma - 0.001) * share
        size = self.step_size.length(float(rows.threat.eps)) * (0.01 + 0.99 * share)
        distance = rows.threat.distance(state["x"], x)
        crossed = rows.goal.reached(answer.logits)
        nearest = torch.where(crossed, torch.minimum(distance, state["nearest"]), state["nearest"])
        slope = torch.linalg.vector_norm(gradient.flatten(1).double(), DUAL[rows.threat.norm], dim=1)
        to_boundary = distance + answer.loss.double().abs() / slope.clamp(min=1e-12)
        longer = torch.where(nearest.isinf(), to_boundary, state["radius"]) * (1 + gamma)
        radius = torch.where(crossed, torch.minimum(state["radius"] * (1 - gamma), nearest), longer)
        largest = rows.threat.distance((x < 0.5).to(x.dtype), x)
        radius = torch.minimum(radius, largest)
        length = gradient.flatten(1).double().norm(dim=1).clamp(min=1e-300)
        moved = state["x"] + per_row((size / length).to(x.dtype), x) * gradient
        return {
            "x": rows.threat.project(moved, x, radius),
            "radius": radius,
            "nearest": nearest,
            "clock": state["clock"] + 1,
        }
