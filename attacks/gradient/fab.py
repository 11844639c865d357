"""Fast adaptive boundary attack (Croce & Hein 2020, arXiv:1907.02044).

Departures from the authors' code: a row stops at its first point within eps; gradients are taken with respect
to the input alone; a point is not queried again when the next step begins there; success is checked at every query
point; each row has its own random start; a goal may have a target, which the authors' attack does not support; a
step also overshoots by eta inside the box.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from robustkit.attack_api import Answer, LoopOptions, Rows, RowWise, State
from robustkit.core.limits import Limits
from robustkit.core.shapes import Images, Logits, PerRow
from robustkit.core.threat import per_row
from robustkit.registry import attack
from robustkit.registry.ranges import Count, Share

TINY = 1e-12
# Temperature of the softmax over the classes that a target must pass, as a share of the missing lead.
TEMPERATURE = 0.3
ORDER = {"linf": math.inf, "l2": 2.0, "l1": 1.0}
DUAL = {"linf": 1.0, "l2": 2.0, "l1": math.inf}


@dataclass(frozen=True, slots=True)
class _FAB(RowWise):
    steps: Count = 100
    restarts: Count = 1
    alpha_max: Share = 0.1
    eta: Annotated[float, Limits(1)] = 1.05
    beta: Share = 0.9

    def loop_options(self, norm: str) -> LoopOptions:
        """Return the loop's options: at most two queries for each step."""
        return LoopOptions(2 * self.steps - 1, restarts=self.restarts, queries_outside_ball=True)

    def init(self, rows: Rows) -> State:
        """Return the clean images; from the second restart on, random points at half of eps."""
        restart = torch.as_tensor(rows.rng.restart, device=rows.x.device).expand(len(rows.x)) % self.restarts
        x = torch.where(per_row(restart == 0, rows.x), rows.x, _start(rows)) if self.restarts > 1 else rows.x
        no = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        return {
            "x": x,
            "clock": no.long(),
            "probing": no,
            "crosses": ~no,
            "needs_gradient": ~no,
            "last": no,
            "nearest": rows.x,
            "distance": torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device),
        }

    def objective(self, rows: Rows, state: State, logits: Logits) -> Tensor:
        """Return the other classes' logits less the label's (B K-1), or of a target's alone (B 1).

        If the goal has a target, it must exceed all other classes: then the value is the target's logit less the
        largest other one. Its gradient is taken to a mean of the largest other logits, because past one of two
        equal classes the target may be farther below the second.
        """
        labels = rows.aim.labels[:, None]
        if rows.goal.targets is not None:
            return _lead(logits, rows.goal.targets[:, None])
        if rows.aim.targets is not None:
            others = rows.aim.targets[:, None]
        else:
            places = torch.arange(logits.shape[1] - 1, device=logits.device)[None, :]
            others = places + (places >= labels)
        return logits.gather(1, others) - logits.gather(1, labels)

    def step(self, rows: Rows, state: State, answer: Answer) -> State:
        """Step to the nearest linearised boundary, or back towards the clean image after crossing the real one.

        After a step a row checks whether it has crossed the boundary (`probing`). If it has, it moves back and
        queries the gradient there; if not, it needs the gradient at its point. So a probe needs a gradient if the
        last one had not crossed.
        """
        x = rows.x
        crossed = rows.goal.reached(answer.logits)
        distance = rows.threat.distance(state["x"], x)
        nearer = crossed & (distance < state["distance"])
        probing = state["probing"]
        back = probing & crossed
        forward = ~back & ~(probing & ~state["needs_gradient"])
        moved = torch.where(per_row(back, x), x + self.beta * (state["x"] - x), state["x"])
        index = forward.nonzero()[:, 0]
        moved[index] = self._forward(rows.select(index), state["x"][index], answer.select(index))
        clock = state["clock"] + forward
        crosses = torch.where(probing, crossed, state["crosses"])
        last = forward & (clock == self.steps)
        return {
            "x": moved,
            "clock": clock,
            "probing": forward,
            "crosses": crosses,
            "needs_gradient": ~(forward & (crosses | last)),
            "last": last,
            "nearest": torch.where(per_row(nearer, x), state["x"], state["nearest"]),
            "distance": torch.where(nearer, distance, state["distance"]),
        }

    def _forward(self, rows: Rows, x: Images, answer: Answer) -> Images:
        """Project x and the clean image onto the nearest boundary, linearised at x; return a mean, past it."""
        norm, clean = rows.threat.norm, rows.x.flatten(1)
        gradients = answer.gradient.flatten(2)
        slopes = torch.linalg.vector_norm(gradients, DUAL[norm], dim=2)
        nearest = (answer.loss.abs() / (slopes + TINY)).argmin(1, keepdim=True)
        weight = gradients.gather(1, nearest[:, :, None].expand(-1, -1, gradients.shape[2]))[:, 0]
        value = answer.loss.gather(1, nearest)[:, 0].to(x.dtype)
        here = x.flatten(1)
        # The value overshoots, not the shift: the box would clip a longer shift, in l1 nearly all of it.
        values = torch.cat([self.eta * value, value + (weight * (clean - here)).sum(1)])
        shifts = to_plane(torch.cat([here, clean]), weight.repeat(2, 1), values, norm)
        lengths = torch.linalg.vector_norm(shifts, ORDER[norm], dim=1).clamp(min=1e-8)
        own, other = lengths.chunk(2)
        share = (own / (own + self.eta * other)).clamp(max=self.alpha_max)[:, None]
        own_shift, other_shift = shifts.chunk(2)
        moved: Images = (1 - share) * (here + own_shift) + share * (clean + self.eta * other_shift)
        moved = moved.clamp(0, 1)
        return moved.view_as(x)


@attack("fab", paper="arXiv:1907.02044", norms=("linf", "l2", "l1"), access="gradient", minimal=True)
@dataclass(frozen=True, slots=True)
class FAB(_FAB):
    """Minimum-norm walk along the nearest of all linearised boundaries; K - 1 backward passes a step.

    `eta` is how far a step overshoots the boundary, `beta` how far a point beyond it is moved back towards the
    clean image, `alpha_max` the largest weight of the clean image's projection. Ends at the first success within
    eps.
    """

    restarts: Count = 5

    def loop_options(self, norm: str) -> LoopOptions:
        """Return the loop's options; the objective has a column for each other class."""
        return replace(_FAB.loop_options(self, norm), vector_objective=True)


@attack("fab-t", paper="arXiv:1907.02044", norms=("linf", "l2", "l1"), access="gradient", minimal=True)
@dataclass(frozen=True, slots=True)
class FABT(_FAB):
    """FAB towards each of the likeliest other classes in turn; one backward pass a step.

    `targets` is at most K - 1; a goal with targets of its own is the only one then.
    """

    targets: Count = 9

    def loop_options(self, norm: str) -> LoopOptions:
        """Return the loop's options, with one attempt for each target."""
        return replace(_FAB.loop_options(self, norm), targets=self.targets)


def _lead(logits: Logits, target: Tensor) -> Tensor:
    """Return the lead (B 1) of a class's logit over the largest other one; its gradient is over their softmax."""
    others = logits.scatter(1, target, -torch.inf).detach()
    largest = others.amax(1, keepdim=True)
    lead = logits.gather(1, target)
    value = lead.detach() - largest
    temperature = (TEMPERATURE * value.abs()).clamp(min=TINY)
    smooth = lead - (((others - largest) / temperature).softmax(1) * logits).sum(1, keepdim=True)
    return smooth + (value - smooth).detach()


def to_plane(points: Tensor, weight: Tensor, value: PerRow, norm: str) -> Tensor:
    """Return the shortest shifts that bring value + weight * shift to zero inside the box, all (B, D).

    If no point of the box does, the shift goes to the corner that comes nearest. In linf and l2 every coordinate
    moves at its own rate (1, or its weight) until it reaches the box; the length of the motion is solved for on
    the piecewise linear progress. In l1 the coordinates with the largest weights move to the box, one by one.
    """
    need = value.abs().double()[:, None]
    downhill = -weight.sign() * torch.where(value < 0, -1, 1).to(weight.dtype)[:, None]
    room = torch.where(downhill > 0, 1 - points, points) * (weight != 0)
    size = weight.abs()
    if norm == "l1":
        heaviest, order = size.sort(dim=1, descending=True)
        room = room.gather(1, order)
        gained = (heaviest * room).cumsum(1, dtype=torch.float64)
        before = gained - heaviest * room
        part = (need - before).clamp(min=0) / heaviest.clamp(min=TINY)
        moved = torch.where(gained <= need, room, torch.minimum(part, room).to(room.dtype))
        return downhill * torch.zeros_like(moved).scatter(1, order, moved)
    rate = torch.ones_like(size) if norm == "linf" else size
    times, order = torch.where(weight != 0, room / torch.where(weight != 0, rate, 1), 0).sort(dim=1)
    slope = (size * rate).gather(1, order).double()
    start = torch.zeros_like(need)
    held = torch.cat([start, (slope * times).cumsum(1)], 1)
    free = torch.cat([slope, start], 1).flip(1).cumsum(1).flip(1)
    progress = held[:, 1:] + times * free[:, 1:]
    piece = (progress < need).sum(1, keepdim=True)
    time = (need - held.gather(1, piece)) / free.gather(1, piece).clamp(min=1e-300)
    time = torch.where(piece == size.shape[1], torch.inf, time)
    return downhill * torch.minimum(torch.where(size > 0, time, 0) * rate, room.double()).to(room.dtype)


def _start(rows: Rows) -> Images:
    """Return random points at half of eps."""
    x, norm = rows.x, rows.threat.norm
    draws = 2 * rows.rng.uniform(*x.shape[1:]) - 1 if norm == "linf" else rows.rng.normal(*x.shape[1:])
    length = torch.linalg.vector_norm(draws.flatten(1), ORDER[norm], dim=1).clamp(min=TINY)
    return (x + (0.5 * rows.reach * draws / per_row(length, draws)).to(x.dtype)).clamp(0, 1)
