"""Multi-targeted ascent that chooses targets by short runs: a few steps at each, then more at the best ones.

Multi-targeted ascent (Gowal et al. 2019, arXiv:1910.09338) of the plain logit margin (minimum-margin attack, Gao
et al. 2022, arXiv:2206.07314), where each sample spends its steps on its own most promising targets. Departures
from both: short probes from the clean image decide which targets get long runs; random restarts continue only
while the best point is near the boundary; steps shrink along a cosine, with APGD's momentum.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from robustkit.attack_api import Answer, LoopOptions, Rows, RowWise, State, rank
from robustkit.core import criteria
from robustkit.core.devices import ComputeDevice
from robustkit.core.shapes import Logits
from robustkit.core.threat import per_row
from robustkit.registry import attack
from robustkit.registry.ranges import Count, NonNegative

# The first and last step of a run, in eps.
LARGEST_STEP, SMALLEST_STEP = 1.0, 0.05
MOMENTUM = 0.75


@attack("race", paper="arXiv:1910.09338", norms=("linf", "l2"), access="gradient")
@dataclass(frozen=True, slots=True)
class Race(RowWise):
    """Short runs towards each of the likeliest other classes, then long runs from random starts towards the best.

    `probe` is the number of steps for each of the `targets`; `steps` is the number for each of the `finalists` in
    each of at most `restarts` rounds. A sample takes part in a round only if its smallest margin is at most
    `doubt` times the margin gained so far; with every round this share is halved, down to an eighth.
    """

    targets: Count = 9
    probe: Count = 4
    finalists: Count = 2
    steps: Count = 40
    restarts: Count = 3
    doubt: NonNegative = 0.3

    def loop_options(self, norm: str) -> LoopOptions:
        """Return the loop's options: one attempt with the steps of all runs and one step between runs."""
        return LoopOptions(len(self._plan(self.targets)) - 1)

    def budget(self, num_classes: int, norm: str) -> int:
        """Return the largest number of forwards for one image."""
        return len(self._plan(min(self.targets, num_classes - 1)))

    def init(self, rows: Rows) -> State:
        """Return the clean images; targets are ranked after the first query."""
        count = len(rows.x)
        zero = torch.zeros(count, dtype=torch.int64, device=rows.x.device)
        return {
            "x": rows.x,
            "before": rows.x,
            "clock": zero,
            "target": zero - 1,
            "ranked": zero[:, None].repeat(1, self.targets),
            "scores": zero[:, None].double().repeat(1, self.targets),
            "clean": zero.double(),
            "last": zero.bool(),
            "needs_gradient": ~zero.bool(),
        }

    def objective(self, rows: Rows, state: State, logits: Logits) -> Tensor:
        """Return the margin of the current target, at first the likeliest class."""
        target = state["target"]
        target = torch.where(target < 0, _ranked(rows, logits, 1)[:, 0], target)
        return criteria.margin(logits, rows.goal.labels, target)

    def step(self, rows: Rows, state: State, answer: Answer) -> State:
        """Record the current target's margin; then step, begin the next run, or end."""
        x, clock = rows.x, state["clock"]
        ranked = _ranked(rows, answer.logits, self.targets)
        count = ranked.shape[1]
        plan = torch.tensor(self._plan(count), dtype=torch.float64, device=x.device)
        now, following = (_Turn(*plan[step.clamp(max=len(plan) - 1)].unbind(1)) for step in (clock, clock + 1))
        first = clock == 0
        margin = rows.goal.loss(answer.logits, "margin").double()
        ranked = torch.where(first[:, None], ranked, state["ranked"][:, :count])
        clean = torch.where(first, margin, state["clean"])
        # Columns move so that the best target of the probes comes first; each round finds them in that order.
        scores = torch.where(first[:, None], -torch.inf, state["scores"][:, :count])
        here = now.target.long()[:, None]
        scores = scores.scatter(1, here, torch.maximum(scores.gather(1, here), margin[:, None]))
        turn = following.gate > 0
        order = torch.where(turn[:, None], scores.argsort(dim=1, descending=True, stable=True), _columns(scores))
        ranked, scores = ranked.gather(1, order), scores.gather(1, order)
        best = scores.amax(1)
        remaining = -best / (best - clean).clamp(min=1e-12)
        size = per_row((now.size * rows.threat.radius).to(x.dtype), x)
        stepped = rows.threat.retract(state["x"] + size * rows.threat.ascent(answer.gradient), x)
        new = per_row(torch.where(now.opens > 0, 1.0, MOMENTUM).to(x.dtype), x)
        moved = state["x"] + new * (stepped - state["x"]) + (1 - new) * (state["x"] - state["before"])
        random = following.random > 0
        # On a CPU reading a mask is free and a random start is not; on a GPU the reverse is true.
        idle = ComputeDevice(x.device).is_cpu and not random.any()
        start = x if idle else torch.where(per_row(random, x), rows.threat.random_start(x, rows.rng), x)
        last = (turn & (remaining > following.gate)) | (clock + 1 >= len(plan) - 1)
        return {
            "x": torch.where(per_row(following.opens > 0, x), start, rows.threat.retract(moved, x)),
            "before": state["x"],
            "clock": clock + 1,
            "target": ranked.gather(1, following.target.long()[:, None])[:, 0],
            "ranked": _widened(ranked, self.targets),
            "scores": _widened(scores, self.targets),
            "clean": clean,
            "last": last,
            "needs_gradient": ~last,
        }

    def _plan(self, targets: int) -> tuple[tuple[float, ...], ...]:
        finalists = min(self.finalists, targets)
        return _plan(targets, self.probe, finalists, self.steps, self.restarts, self.doubt)


class _Turn(NamedTuple):
    """The purpose of queries (B): the target's column, the next step's size, whether a run begins, and randomly.

    `gate` is above 0 if a round begins: the largest remaining margin, as a share of the margin gained so far.
    """

    target: Tensor
    size: Tensor
    opens: Tensor
    random: Tensor
    gate: Tensor


@functools.cache
def _plan(
    targets: int, probe: int, finalists: int, steps: int, restarts: int, doubt: float
) -> tuple[tuple[float, ...], ...]:
    """Return the `_Turn` of each query as a row of numbers."""
    runs = [(target, probe, 0.0, 0.0) for target in range(targets)]
    for number in range(restarts):
        gates = [doubt / 2 ** min(number, 3)] + [0.0] * (finalists - 1)
        runs += [(target, steps, 1.0, gate) for target, gate in enumerate(gates)]
    plan = []
    for target, length, random, gate in runs:
        for index in range(length + 1):
            fall = 0.5 * (1 + math.cos(math.pi * min(index / max(length - 1, 1), 1)))
            size = SMALLEST_STEP + (LARGEST_STEP - SMALLEST_STEP) * fall
            plan.append((target, size, float(index == 0), random, gate if index == 0 else 0.0))
    return tuple(plan)


def _ranked(rows: Rows, logits: Logits, count: int) -> Tensor:
    """Return the targets, likeliest first; only the goal's own if it has one."""
    if rows.goal.targets is not None:
        return rows.goal.targets[:, None]
    return rank(logits, rows.goal.labels, count)


def _columns(like: Tensor) -> Tensor:
    return torch.arange(like.shape[1], device=like.device).expand_as(like)


def _widened(columns: Tensor, count: int) -> Tensor:
    """Return the columns with the first repeated up to the count."""
    return torch.cat([columns, columns[:, :1].expand(-1, count - columns.shape[1])], 1)
