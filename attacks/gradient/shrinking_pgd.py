"""PGD in a ball that shrinks to just below the nearest adversarial point: a search for minimum norms.

It differs from the fast minimum-norm attack (Pintor et al. 2021, arXiv:2102.12827) in three ways: steps are a
share of the current radius, so that they suit any image; in linf they follow the signs of the gradient; the radius
never grows beyond the nearest point found. Targeted runs towards each of the likeliest classes find nearer points
than one untargeted run of the same length: see docs/minimum_norm.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from robustkit.attack_api import Answer, LoopOptions, Rows, RowWise, State
from robustkit.core.errors import did_you_mean
from robustkit.core.shapes import Images, PerRow
from robustkit.core.threat import per_row, unit
from robustkit.registry import attack
from robustkit.registry.ranges import Count, Positive, ShareBelowOne

STARTS = ("clean", "random", "nearest")
DUAL = {"linf": 1.0, "l2": 2.0, "l1": math.inf}
# The first step as a share of the radius, and the last step as a share of the first.
FIRST_STEP = {"linf": 1.0, "l2": 2.0, "l1": 4.0}
LAST_STEP = 0.01
# The relative change of the radius in the last steps.
LAST_GAMMA = 0.0005
# The radius stays below the nearest point found by this share of its change.
NEAREST_MARGIN = 0.2
TINY = 1e-12


@dataclass(frozen=True, slots=True)
class _ShrinkingPGD(RowWise):
    steps: Count = 50
    restarts: Count = 1
    first_step: Positive | None = None
    gamma: ShareBelowOne = 0.05
    start: str = "clean"

    def __post_init__(self) -> None:
        """Raise UsageError for an unknown start."""
        if self.start not in STARTS:
            raise did_you_mean("start", self.start, STARTS)

    @property
    def loss(self) -> str:
        """The loss: the difference of logits."""
        return "margin"

    def loop_options(self, norm: str) -> LoopOptions:
        """Return the loop's options; queries may lie outside the threat."""
        return LoopOptions(self.steps, restarts=self.restarts, queries_outside_ball=True)

    def init(self, rows: Rows) -> State:
        """Return the starting points, and the distance of the nearest adversarial point, infinite if unknown."""
        x, nearest = rows.x, torch.full((len(rows.x),), math.inf, dtype=torch.float64, device=rows.x.device)
        random = torch.as_tensor(rows.rng.restart, device=x.device).expand(len(x)) % self.restarts > 0
        random = random | (self.start == "random")
        point = x
        if rows.threat.minimal and rows.nearest is not None:
            distance = rows.threat.distance(rows.nearest, x)
            nearest = torch.where(distance > 0, distance, nearest)
            point = rows.nearest if self.start == "nearest" else x
        if self.start == "random" or self.restarts > 1:
            point = torch.where(per_row(random, x), rows.random_start(), point)
        clock = torch.zeros_like(nearest, dtype=torch.int64)
        return {"x": point, "radius": nearest * (1 - self.gamma), "nearest": nearest, "clock": clock}

    def step(self, rows: Rows, state: State, answer: Answer) -> State:
        """Adapt the radius, and take a gradient step inside it."""
        x, threat, gradient = rows.x, rows.threat, answer.gradient
        share = (1 + torch.cos(math.pi * state["clock"].double() / self.steps)) / 2
        gamma = LAST_GAMMA + (self.gamma - LAST_GAMMA) * share
        distance = threat.distance(state["x"], x)
        crossed = rows.goal.reached(answer.logits)
        nearest = torch.where(crossed, torch.minimum(distance, state["nearest"]), state["nearest"])
        slope = torch.linalg.vector_norm(gradient.flatten(1).double(), DUAL[threat.norm], dim=1)
        ahead = (distance + answer.loss.double().abs() / slope.clamp(min=TINY)) * (1 + gamma)
        grown = torch.minimum(state["radius"] * (1 + gamma), nearest * (1 - NEAREST_MARGIN * gamma))
        shrunk = torch.minimum(state["radius"], distance) * (1 - gamma)
        radius = torch.where(crossed, shrunk, torch.where(nearest.isinf(), ahead, grown))
        radius = torch.minimum(radius, threat.distance((x < 0.5).to(x.dtype), x))
        size = radius * (LAST_STEP + ((self.first_step or FIRST_STEP[threat.norm]) - LAST_STEP) * share)
        moved = state["x"] + _move(rows, state["x"], gradient, size)
        return {
            "x": threat.project(moved, x, radius),
            "radius": radius,
            "nearest": nearest,
            "clock": state["clock"] + 1,
        }


def _move(rows: Rows, point: Images, gradient: Images, size: PerRow) -> Images:
    """Return a step whose length is `size` (B) in the threat's norm.

    In l1 it is along the gradient, as in l2, because the projection makes it sparse. Its l1 length is about that
    of a step as sparse as the current change.
    """
    if rows.threat.norm == "linf":
        return per_row(size, point).to(point.dtype) * gradient.sign()
    if rows.threat.norm == "l1":
        change = (point - rows.x).flatten(1).double()
        total = change.abs().sum(1)
        size = size * torch.where(total > 0, change.norm(dim=1) / total.clamp(min=TINY), 1)
    return per_row(size, point).to(point.dtype) * unit(gradient)


@attack("shrinking-pgd", paper="docs/minimum_norm.md", norms=("linf", "l2", "l1"), access="gradient", minimal=True)
@dataclass(frozen=True, slots=True)
class ShrinkingPGD(_ShrinkingPGD):
    """PGD in a ball that shrinks to just below the nearest adversarial point found; ends within eps.

    `first_step` is the first step's length as a share of the radius, by default 1 in linf, 2 in l2 and 4 in l1;
    it falls to a hundredth of the radius. `gamma` is the relative change of the radius at first. `start` is where
    the first restart begins: at the `clean` image, at a `random` point or, without an eps, at the `nearest` point
    found by earlier attacks. Later restarts begin at random points.
    """


@attack(
    "shrinking-pgd-t", paper="docs/minimum_norm.md", norms=("linf", "l2", "l1"), access="gradient", minimal=True
)
@dataclass(frozen=True, slots=True)
class ShrinkingPGDT(_ShrinkingPGD):
    """Shrinking PGD towards each of the likeliest other classes in turn.

    `targets` is at most K - 1; a goal with targets of its own is the only one then. For the other fields see
    `shrinking-pgd`.
    """

    targets: Count = 9

    def loop_options(self, norm: str) -> LoopOptions:
        """Return the options of `shrinking-pgd`, with one attempt for each target."""
        return replace(_ShrinkingPGD.loop_options(self, norm), targets=self.targets)
