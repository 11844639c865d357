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

import numpy as np
import torch
from torch import Tensor

from robustkit.attack_api import Answer, LoopOptions, Rows, RowWise, State, rank
from robustkit.core import criteria
from robustkit.core.shapes import Images, Logits
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
        if (rows.steps_taken == 0).any():
            target = torch.where(target < 0, _ranked(rows, logits, 1)[:, 0], target)
        return criteria.margin(logits, rows.goal.labels, target)

    def step(self, rows: Rows, state: State, answer: Answer) -> State:
        """Record the current target's margin; then step, begin the next run, or end."""
        x, clock = rows.x, rows.steps_taken - 1
        count = 1 if rows.goal.targets is not None else min(self.targets, answer.logits.shape[1] - 1)
        plan = self._plan(count)
        now, following = (_Turn(*plan[np.minimum(step, len(plan) - 1)].T) for step in (clock, clock + 1))
        scored = self._scored(rows, state, answer, clock == 0, now.target)
        ended = clock + 1 >= len(plan) - 1
        if (following.gate > 0).any():
            scored = self._next_round(rows, scored, count, following.gate, ended)
        elif ended.any():
            last = rows.upload(ended)
            scored |= {"last": last, "needs_gradient": ~last}
        if (clock == 0).any() or following.opens.any():
            target = rows.upload(following.target.astype(np.int64))[:, None]
            scored["target"] = scored["ranked"].gather(1, target)[:, 0]
        size = per_row(rows.upload(now.size * rows.threat.radius, x.dtype), x)
        stepped = rows.retract(state["x"] + size * rows.threat.ascent(answer.gradient))
        moved = rows.with_momentum(state["x"], stepped, state["before"], now.opens > 0, MOMENTUM)
        moved = rows.retract(moved)
        if following.opens.any():
            moved = _restarted(rows, moved, following)
        return {**scored, "x": moved, "before": state["x"]}

    def _scored(self, rows: Rows, state: State, answer: Answer, first: np.ndarray, column: np.ndarray) -> State:
        """Return the state with the margin recorded in each row's column; `first` are rows that begin (B)."""
        margin = rows.goal.loss(answer.logits, "margin").double()
        scored = dict(state)
        if first.any():
            begins = rows.upload(first)
            ranked = _widened(_ranked(rows, answer.logits, self.targets), self.targets)
            scored["ranked"] = torch.where(begins[:, None], ranked, state["ranked"])
            scored["clean"] = torch.where(begins, margin, state["clean"])
            scored["scores"] = torch.where(begins[:, None], -torch.inf, state["scores"])
        here = rows.upload(column.astype(np.int64))[:, None]
        best = torch.maximum(scored["scores"].gather(1, here), margin[:, None])
        scored["scores"] = scored["scores"].scatter(1, here, best)
        return scored

    def _next_round(self, rows: Rows, state: State, count: int, gate: np.ndarray, ended: np.ndarray) -> State:
        """Sort the columns of rows at a gate, best target first; end rows that are too far from the boundary.

        Each round then finds its targets in that order.
        """
        ranked, scores, clean = state["ranked"][:, :count], state["scores"][:, :count], state["clean"]
        turn = rows.upload(gate > 0)
        order = scores.argsort(dim=1, descending=True, stable=True)
        order = torch.where(turn[:, None], order, torch.arange(count, device=turn.device))
        best = scores.amax(1)
        remaining = -best / (best - clean).clamp(min=1e-12)
        last = (turn & (remaining > rows.upload(gate))) | rows.upload(ended)
        return {
            **state,
            "ranked": _widened(ranked.gather(1, order), self.targets),
            "scores": _widened(scores.gather(1, order), self.targets),
            "last": last,
            "needs_gradient": ~last,
        }

    def _plan(self, targets: int) -> np.ndarray:
        finalists = min(self.finalists, targets)
        return _plan(targets, self.probe, finalists, self.steps, self.restarts, self.doubt)


class _Turn(NamedTuple):
    """The purpose of queries (B): the target's column, the next step's size, whether a run begins, and randomly.

    `gate` is above 0 if a round begins: the largest remaining margin, as a share of the margin gained so far.
    """

    target: np.ndarray
    size: np.ndarray
    opens: np.ndarray
    random: np.ndarray
    gate: np.ndarray


@functools.cache
def _plan(targets: int, probe: int, finalists: int, steps: int, restarts: int, doubt: float) -> np.ndarray:
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
    return np.array(plan)


def _restarted(rows: Rows, points: Images, following: _Turn) -> Images:
    """Return the points with those of rows whose next query opens a run: random ones, or the clean images."""
    opens = np.flatnonzero(following.opens)
    index = rows.upload(opens)
    start = rows.x[index]
    random = np.flatnonzero(following.random[opens])
    if len(random):
        chosen = rows.rng.select(torch.from_numpy(opens[random]))
        begins = rows.upload(random)
        start = start.index_copy(0, begins, rows.threat.random_start(start[begins], chosen))
    return points.index_copy(0, index, start)


def _ranked(rows: Rows, logits: Logits, count: int) -> Tensor:
    """Return the targets, likeliest first; only the goal's own if it has one."""
    if rows.goal.targets is not None:
        return rows.goal.targets[:, None]
    return rank(logits, rows.goal.labels, count)


def _widened(columns: Tensor, count: int) -> Tensor:
    """Return the columns with the first repeated up to the count."""
    return torch.cat([columns, columns[:, :1].expand(-1, count - columns.shape[1])], 1)
