"""The loop of every iterative search, and the attempts of one attack in this loop, on one batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from robustkit.attack_api.row_wise import LoopOptions, RowWise, query_rows, rank
from robustkit.attack_api.rows import Answer, Model, Rows, State, select_state
from robustkit.core.criteria import Goal
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images
from robustkit.core.threat import ThreatModel, per_row

S = TypeVar("S")
A = TypeVar("A")

# The largest margin of a point without success; a success has an infinite one.
LARGEST_MARGIN = 1e300


def drive(
    state: S,
    steps: int,
    query: Callable[[int, S], A],
    step: Callable[[int, S, A], S],
    observe: Callable[[S, A], tuple[S, A] | None] | None = None,
) -> S:
    """Alternate queries and steps, and return the last state.

    The loop does not depend on models or attacks: the caller decides what a query is (a forward and backward pass,
    the gradient of an ensemble, one pass for the rows of several attacks) and what is observed of its result.

    Args:
        state: before the first query.
        steps: how many steps are taken, at least 0.
        query: from the number of the step (from 0) and the state to a result.
        step: from the number of the step, the state and the result to the next state.
        observe: called with each state and result, with those after the last step too. It returns them for the
            rows that continue, or None to end the loop.

    Example:
        >>> drive(1.0, 3, query=lambda number, x: -2 * x, step=lambda number, x, slope: x + 0.25 * slope)
        0.125
    """
    for number in range(steps if observe is None else steps + 1):
        result = query(number, state)
        if observe is not None:
            kept = observe(state, result)
            if kept is None:
                break
            state, result = kept
        if number < steps:
            state = step(number, state, result)
    return state


def run_attempts(
    attack: RowWise,
    model: Model,
    x: Images,
    goal: Goal,
    threat: ThreatModel,
    rng: RowRng,
    known: Images | None = None,
) -> Images:
    """Run an iterative attack; return for each row its first success, else its point of highest margin.

    The points are inside the threat; it is the clean image if no query was inside. A row that succeeds stops, but
    if the threat is minimal it continues to the last step, and its nearest success is returned. It costs at most
    `attack.budget` forward passes per row, and a backward pass for all but one of an attempt's.

    Args:
        attack: what is run.
        model: from images (B C H W) to logits (B K).
        x: clean images (B C H W) in [0, 1].
        goal: the labels, and the targets if there are any.
        threat: the perturbations that are allowed.
        rng: random numbers, each row's own.
        known: if the threat is minimal, the nearest adversarial points known so far (B C H W), the clean image if
            there is none.
    """
    x = x.detach()
    found = _Found(x.clone(), torch.full((len(x),), -torch.inf, dtype=torch.float64, device=x.device))
    if known is not None:
        there = (known != x).flatten(1).any(1)
        found.offer(torch.arange(len(x), device=x.device)[there], known[there], threat.worth(known, x)[there])
    options, bounds = attack.loop_options(threat.norm), threat.bounds(x)
    ranked = None
    open_rows = torch.arange(len(x), device=x.device)
    if options.targets and goal.targets is None and len(x):
        with torch.no_grad():
            logits = model(x).detach()
        ranked = rank(logits, goal.labels, options.targets)
        reached = goal.reached(logits)
        found.margin[reached] = torch.inf
        open_rows = open_rows[~reached]
    for job in range(options.restarts * (1 if ranked is None else ranked.shape[1])):
        if not len(open_rows):
            break
        aim = goal if ranked is None else replace(goal, targets=ranked[:, job // options.restarts])
        nearest = torch.where(per_row(found.margin > 0, x), found.x, x) if threat.minimal else None
        rows = Rows(x, goal, threat, rng.at(restart=job), aim, nearest=nearest, bounds=bounds)
        rows = rows.select(open_rows)
        _Attempt(attack, model, options, rows, open_rows, found).run()
        open_rows = open_rows[found.margin[open_rows] < torch.inf]
    return found.x


@dataclass
class _Found:
    """The best point of each sample so far, and its margin; for a success its value, which is above 0."""

    x: Images
    margin: Tensor

    def offer(self, position: Tensor, x: Images, margin: Tensor) -> None:
        """Replace the points of these samples by better ones."""
        better = margin > self.margin[position]
        self.x[position] = torch.where(per_row(better, x), x, self.x[position])
        self.margin[position] = torch.where(better, margin, self.margin[position])


@dataclass
class _Attempt:
    """One job of each row; `position` (B) are the rows' indices in `found`."""

    attack: RowWise
    model: Model
    options: LoopOptions
    rows: Rows
    position: Tensor
    found: _Found

    def run(self) -> None:
        """Take all steps; store each row's best point when it stops."""
        state = self.attack.init(self.rows)
        self.best = state["x"]
        self.margin = torch.full((len(self.position),), -torch.inf, dtype=torch.float64, device=self.best.device)
        drive(state, self.options.steps, self._query, self._step, self._observe)
        self.found.offer(self.position, self.best, self.margin)

    def _query(self, number: int, state: State) -> Answer:
        return query_rows(self.attack, self.model, self.rows, state, number < self.options.steps)

    def _observe(self, state: State, answer: Answer) -> tuple[State, Answer] | None:
        """Keep each row's best point; drop the rows that succeed or end here."""
        rows = self.rows
        reached = rows.goal.reached(answer.logits)
        if rows.threat.minimal:
            now = torch.where(reached, rows.threat.worth(state["x"], rows.x), -torch.inf)
        else:
            margin = rows.goal.loss(answer.logits, "margin").double().clamp(max=LARGEST_MARGIN)
            now = margin.masked_fill(reached, torch.inf)
        if self.options.queries_outside_ball:
            now = torch.where(rows.threat.contains(state["x"], rows.x), now, -torch.inf)
        better = now > self.margin
        self.best = torch.where(better.view(-1, 1, 1, 1), state["x"], self.best)
        self.margin = torch.where(better, now, self.margin)
        leave = self.margin == torch.inf
        if "last" in state:
            leave = leave | state["last"]
        if not leave.any():
            return state, answer
        self.found.offer(self.position[leave], self.best[leave], self.margin[leave])
        kept = (~leave).nonzero()[:, 0]
        self.position, self.rows = self.position[kept], rows.select(kept)
        self.best, self.margin = self.best[kept], self.margin[kept]
        return (select_state(state, kept), answer.select(kept)) if len(kept) else None

    def _step(self, number: int, state: State, answer: Answer) -> State:
        self.rows = replace(self.rows, rng=replace(self.rows.rng, step=number + 1))
        return self.attack.step(self.rows, state, answer)


@dataclass(frozen=True)
class AttackTrace:
    """An attack's losses and whether the model was fooled, both (B T), and its last points (B C H W)."""

    losses: Tensor
    fooled: Tensor
    last: Images


def trace_attack(
    attack: RowWise,
    model: Model,
    x: Images,
    goal: Goal,
    threat: ThreatModel,
    rng: RowRng,
    loss: str = "margin",
    enough: bool = False,
) -> AttackTrace:
    """Run one attempt of an attack on all rows to its end, also for rows that succeed earlier.

    Args:
        attack: whose first attempt is run.
        model: what is attacked.
        x: clean images.
        goal: of each row.
        threat: the perturbations that are allowed.
        rng: random numbers.
        loss: the recorded loss; for a targeted attack its target is the second likeliest class.
        enough: end once every row has had a success.
    """
    rows, steps = Rows(x, goal, threat, rng, goal, bounds=threat.bounds(x)), attack.loop_options(threat.norm).steps
    logits, fooled = list[Tensor](), list[Tensor]()

    def query(number: int, state: State) -> Answer:
        return query_rows(attack, model, rows, state, number < steps)

    def observe(state: State, answer: Answer) -> tuple[State, Answer] | None:
        logits.append(answer.logits)
        reached = goal.reached(answer.logits)
        fooled.append(reached & threat.contains(state["x"], x) if reached.any() else reached)
        return None if enough and torch.stack(fooled).any(0).all() else (state, answer)

    def step(number: int, state: State, answer: Answer) -> State:
        nonlocal rows
        rows = replace(rows, rng=replace(rng, step=number + 1))
        return attack.step(rows, state, answer)

    last = drive(attack.init(rows), steps, query, step, observe)["x"]
    every_query = goal.select(torch.arange(len(x), device=x.device).repeat(len(logits)))
    losses = every_query.loss(torch.cat(logits), loss).view(len(logits), len(x)).T
    return AttackTrace(losses, torch.stack(fooled, 1), last)
