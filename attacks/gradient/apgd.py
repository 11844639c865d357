"""Auto-PGD (Croce & Hein 2020, arXiv:2003.01690), and in l1 the version of Croce & Hein 2021, arXiv:2103.01208.

From the same start, the iterates are those of the authors' code, including its first oscillation check, which
reads an empty entry before the start: the first step counts as a rise if its loss is above zero. Departures from
the code: a row stops at its first success; with several draws of a random model, the step size and the best point
depend on the mean loss, not on the last draw's, and success on the mean logits; in l1 a coordinate counts as
changed only if it differs from the clean one (theirs counts rounding errors too), and points of the larger balls
count if they lie within eps. A setting of None is that of AutoAttack's `standard` suite for the norm.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from robustkit.attack_api import Answer, LoopOptions, Rows, RowWise, State
from robustkit.core import criteria
from robustkit.core.shapes import Images, Mask, PerRow
from robustkit.core.threat import per_row
from robustkit.registry import attack
from robustkit.registry.ranges import Count, NonNegative, PositiveShare

MOMENTUM = 0.75


@dataclass(frozen=True, slots=True)
class _APGD(RowWise):
    steps: Count = 100
    restarts: Count | None = None
    loss: str = "ce"
    eot_iter: Count = 1
    rho: PositiveShare = 0.75
    large_start: bool | None = None
    doubt: NonNegative | None = None

    def __post_init__(self) -> None:
        """Raise UsageError for an unknown loss."""
        criteria.loss(self.loss)

    def loop_options(self, norm: str) -> LoopOptions:
        """Return the loop's options: steps of all stages, and one between stages."""
        return LoopOptions(
            steps=self.steps + len(_stages(self.steps, norm, self.large_start)) - 1,
            restarts=self.restarts or 1,
            queries_outside_ball=self.large_start is not False,
            eot_samples=self.eot_iter,
            boundary_only=self.doubt,
        )

    def init(self, rows: Rows) -> State:
        """Return the starting points; the rest of the state is set after the first query."""
        factor, _ = _stages(self.steps, rows.threat.norm, self.large_start)[0]
        zero = torch.zeros(len(rows.x), dtype=torch.float64, device=rows.x.device)
        return {
            "x": _start(rows, factor * rows.threat.radius),
            "before": rows.x,
            "best": rows.x,
            "best_gradient": torch.zeros_like(rows.x),
            "best_loss": zero,
            "last_loss": zero,
            "reviewed_loss": zero,
            "rises": zero,
            "halved": zero.bool(),
            "size": zero,
            "changed": torch.full_like(zero, rows.x[0].numel()),
            "density": torch.full_like(zero, 0.2),
        }

    def step(self, rows: Rows, state: State, answer: Answer) -> State:
        """Return the next points, best points and step sizes."""
        norm, eps = rows.threat.norm, rows.threat.radius
        plan = _plan(self.steps, norm, self.large_start)[rows.steps_taken - 1]
        first = plan[:, 1] > 0
        state = _record(rows, state, answer, first, plan[:, 0] * eps * (1 if norm == "l1" else 2))
        if norm != "l1":
            return _step(rows, state, answer, first, plan[:, 2], self.rho)
        factor, begins, window, following = rows.upload(plan.T)
        due = window > 0
        renew = due | (begins > 0) if len(_stages(self.steps, norm, self.large_start)) > 1 else due
        return _step_l1(rows, state, answer, due, renew, factor * eps, following * eps)


@attack("apgd", paper="arXiv:2003.01690", norms=("linf", "l2", "l1"), access="gradient")
@dataclass(frozen=True, slots=True)
class APGD(_APGD):
    """Projected gradient with momentum and a step size that adapts itself, on `loss` (ce, dlr, margin).

    `restarts` is by default 1, in l1 5; `rho` is the share of rises that keeps a step size; `large_start` (only
    l1, where it is the default) begins in balls of 3 and 2 times eps; `eot_iter` is the number of draws to average
    over. `doubt` limits the attack to images whose margin is at most this share of the change that earlier attacks
    of the run made to it.
    """


@attack("apgd-t", paper="arXiv:2003.01690", norms=("linf", "l2", "l1"), access="gradient")
@dataclass(frozen=True, slots=True)
class APGDT(_APGD):
    """Auto-PGD towards each of the likeliest other classes in turn, on the targeted `loss`.

    `targets` is by default 9, in l1 5, and at most K - 1; a goal with targets of its own is the only one then. For
    the other fields see `apgd`.
    """

    restarts: Count | None = 1
    loss: str = "dlr"
    targets: Count | None = None

    def loop_options(self, norm: str) -> LoopOptions:
        """Return the options of `apgd`, with one attempt for each target."""
        return replace(_APGD.loop_options(self, norm), targets=self.targets or (5 if norm == "l1" else 9))


def _stages(steps: int, norm: str, large_start: bool | None) -> list[tuple[int, int]]:
    """Return (radius in eps, steps) of each stage of an attempt."""
    most = math.ceil(0.3 * steps)
    if norm == "l1" and large_start is not False and steps > 2 * most:
        return [(3, most), (2, most), (1, steps - 2 * most)]
    return [(1, steps)]


@functools.cache
def _plan(steps: int, norm: str, large_start: bool | None) -> np.ndarray:
    """Return for each query (Q 4): radius in eps, whether it begins a stage, window, radius of the next stage.

    The window is the number of steps since the last check of the step size, where one is due, else 0. The next
    radius is 0 except at the end of a stage that is not the last.
    """
    plan = []
    stages = _stages(steps, norm, large_start)
    for number, (factor, count) in enumerate(stages):
        window = max(int((0.04 if norm == "l1" else 0.22) * count), 1)
        least = window if norm == "l1" else max(int(0.06 * count), 1)
        shrink = max(int(0.03 * count), 1)
        following = stages[number + 1][0] if number + 1 < len(stages) else 0
        since = 0
        for index in range(count + 1):
            since += index > 0
            due = since == window
            plan.append((factor, index == 0, window * due, following * (index == count)))
            if due:
                since, window = 0, max(window - shrink, least)
    return np.array(plan, np.float64)


def _start(rows: Rows, radius: float) -> Images:
    """Return random points: scaled to the ball's surface in linf and l2, noise projected onto it in l1."""
    x, shape = rows.x, rows.x.shape[1:]
    if rows.threat.norm == "linf":
        noise = 2 * rows.rng.uniform(*shape) - 1
        length = noise.flatten(1).abs().amax(1)
    else:
        noise = rows.rng.normal(*shape)
        length = noise.flatten(1).norm(dim=1)
    if rows.threat.norm == "l1":
        return rows.threat.project(x + noise.to(x.dtype), x, torch.full_like(length, radius, dtype=torch.float64))
    shift = radius * noise / per_row(length.clamp(min=1e-12), noise)
    return rows.threat.retract(x + shift.to(x.dtype), x)


def _record(rows: Rows, state: State, answer: Answer, first: np.ndarray, size: np.ndarray) -> State:
    """Update the best point so far and the count of rises; reset them where a stage begins (B)."""
    loss = answer.loss.double()
    better = loss > state["best_loss"]
    rises = state["rises"] + (loss > state["last_loss"])
    begun: State = {}
    last_loss = loss
    if first.any():
        begins = rows.upload(first)
        better, rises, last_loss = better | begins, torch.where(begins, 0, rises), torch.where(begins, 0, loss)
        begun = {
            "reviewed_loss": torch.where(begins, loss, state["reviewed_loss"]),
            "halved": state["halved"] | begins,
            "size": torch.where(begins, rows.upload(size), state["size"]),
        }
    return {
        **state,
        "best": _pick(better, state["x"], state["best"]),
        "best_gradient": _pick(better, answer.gradient, state["best_gradient"]),
        "best_loss": torch.where(better, loss, state["best_loss"]),
        "last_loss": last_loss,
        "rises": rises,
        **begun,
    }


def _step(rows: Rows, state: State, answer: Answer, first: np.ndarray, window: np.ndarray, rho: float) -> State:
    """Halve step sizes where the loss rises too rarely, and return to the best point; then step with momentum."""
    point, gradient = state["x"], answer.gradient
    if window.any():
        steps = rows.upload(window)
        due = steps > 0
        stuck = ~state["halved"] & (state["reviewed_loss"] >= state["best_loss"])
        halve = due & (stuck | (state["rises"] <= rho * steps))
        point = _pick(halve, state["best"], point)
        gradient = _pick(halve, state["best_gradient"], gradient)
        state = {
            **state,
            "size": torch.where(halve, state["size"] / 2, state["size"]),
            "halved": torch.where(due, halve, state["halved"]),
            "reviewed_loss": torch.where(due, state["best_loss"], state["reviewed_loss"]),
            "rises": torch.where(due, 0, state["rises"]),
        }
    size = per_row(state["size"].to(point.dtype), point)
    stepped = rows.retract(point + size * rows.threat.ascent(gradient))
    moved = rows.with_momentum(point, stepped, state["before"], first, MOMENTUM)
    return {**state, "x": rows.retract(moved), "before": point}


def _step_l1(
    rows: Rows, state: State, answer: Answer, due: Mask, renew: Mask, radius: PerRow, following: PerRow
) -> State:
    """Step along the largest gradients, as many as the best point's sparsity sets, or begin the next stage.

    If the best point has become sparser, the step size is reset and the search returns to it; else the step size
    shrinks.
    """
    x, total = rows.x, rows.x[0].numel()
    changed = (state["best"] != x).flatten(1).sum(1).double()
    sparser = due & (changed < 0.95 * state["changed"])
    shrunk = (state["size"] / 1.5).clamp(min=radius / 10)
    size = torch.where(sparser, radius, torch.where(due, shrunk, state["size"]))
    density = torch.where(renew, changed / total / 1.5, state["density"])
    gradient = _pick(sparser, state["best_gradient"], answer.gradient).flatten(1)
    strength = gradient.abs()
    index = ((1 - density) * total).clamp(0, total - 1).long()
    threshold = strength.sort(dim=1).values.gather(1, index[:, None])
    direction = torch.where(strength >= threshold, gradient.sign(), 0)
    step = size[:, None].to(x.dtype) * direction / (direction.abs().sum(1, keepdim=True) + 1e-10)
    moved = _pick(sparser, state["best"], state["x"]) + step.view_as(x)
    turn = following > 0
    return {
        **state,
        "x": rows.threat.project(_pick(turn, state["best"], moved), x, torch.where(turn, following, radius)),
        "size": size,
        "changed": torch.where(renew, changed, state["changed"]),
        "density": density,
    }


def _pick(rows: Mask, selected: Tensor, other: Tensor) -> Tensor:
    """Return `selected` in these rows and `other` in the others."""
    return torch.where(per_row(rows, selected), selected, other)
