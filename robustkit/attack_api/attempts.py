"""The plain loop over an iterative attack's targets and restarts, on one batch and one model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from robustkit.attack_api.driver import drive
from robustkit.attack_api.queries import query_rows, rank
from robustkit.attack_api.rows import Answer, Model, Rows, State, select_state
from robustkit.core.criteria import Goal
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images
from robustkit.core.threat import ThreatModel, per_row

if TYPE_CHECKING:
    from robustkit.attack_api.row_wise import LoopOptions, RowWise

# Margins of points that do not succeed stay below a success's, which is infinite.
LARGEST_MARGIN = 1e300


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

    The points are inside the threat, the clean image where no query was. A row that succeeds leaves at once, but
    where the threat is minimal it goes on to the last step, and its nearest success is returned. It costs at most
    `attack.budget` forward passes per row, and a backward pass for all but one of an attempt's.

    Args:
        attack: what is run.
        model: from images (B C H W) to logits (B K).
        x: clean images (B C H W) in [0, 1].
        goal: the labels, and the targets if there are any.
        threat: the perturbations that are allowed.
        rng: random numbers, each row's own.
        known: where the threat is minimal, the nearest adversarial points that there are already (B C H W), the
            clean image where there is none.
    """
    x = x.detach()
    found = _Found(x.clone(), torch.full((len(x),), -torch.inf, dtype=torch.float64, device=x.device))
    if known is not None:
        there = (known != x).flatten(1).any(1)
        found.offer(torch.arange(len(x), device=x.device)[there], known[there], threat.worth(known, x)[there])
    options = attack.loop_options(threat.norm)
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
        rows = Rows(x, goal, threat, rng.at(restart=job), aim, nearest=nearest).select(open_rows)
        _Attempt(attack, model, options, rows, open_rows, found).run()
        open_rows = open_rows[found.margin[open_rows] < torch.inf]
    return found.x


@dataclass
class _Found:
    """The best point of each sample so far, and its margin; of a success what that is worth, which is above 0."""

    x: Images
    margin: Tensor

    def offer(self, position: Tensor, x: Images, margin: Tensor) -> None:
        """Take over the points of these samples where they are better."""
        better = margin > self.margin[position]
        self.x[position] = torch.where(per_row(better, x), x, self.x[position])
        self.margin[position] = torch.where(better, margin, self.margin[position])


@dataclass
class _Attempt:
    """One job of each row; `position` (B) are the rows' places in `found`."""

    attack: RowWise
    model: Model
    options: LoopOptions
    rows: Rows
    position: Tensor
    found: _Found

    def run(self) -> None:
        """Take all steps, and offer each row's best point when it leaves."""
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
        short = rows.goal.loss(answer.logits, "margin").double().clamp(max=LARGEST_MARGIN)
        short = torch.full_like(short, -torch.inf) if rows.threat.minimal else short
        now = torch.where(reached, rows.threat.worth(state["x"], rows.x), short)
        if self.options.queries_outside_ball:
            now = torch.where(rows.threat.contains(state["x"], rows.x), now, -torch.inf)
        better = now > self.margin
        self.best = torch.where(per_row(better, self.best), state["x"], self.best)
        self.margin = torch.where(better, now, self.margin)
        leave = self.margin == torch.inf
        if "last" in state:
            leave = leave | state["last"]
        if not leave.any():
            return state, answer
        self.found.offer(self.position[leave], self.best[leave], self.margin[leave])
        stay = (~leave).nonzero()[:, 0]
        self.position, self.rows = self.position[stay], rows.select(stay)
        self.best, self.margin = self.best[stay], self.margin[stay]
        return (select_state(state, stay), answer.select(stay)) if len(stay) else None

    def _step(self, number: int, state: State, answer: Answer) -> State:
        self.rows = replace(self.rows, rng=self.rows.rng.at(step=number + 1))
        return self.attack.step(self.rows, state, answer)
