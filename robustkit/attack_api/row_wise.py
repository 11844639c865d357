"""The common shape of iterative attacks: row-wise pure functions and one loop that runs any of them.

An attack subclasses `RowWise` and gives `init(rows) -> state` and `step(rows, state, answer) -> state`. A state
is a dict of tensors with one row per job, the next query point under "x". Nothing in it may look at another
row, so a scheduler can mix, drop and refill rows freely; `iterate` is the plain loop.

A job is one attempt at one sample: a target (for attacks that try several) and a restart. What it aims at is
its row's `aim`; whether it has succeeded only the sample's own `goal` and the threat decide.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from robustkit.core.criteria import Goal
from robustkit.core.losses import finite
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images, Labels, Logits, Mask
from robustkit.core.threat import ThreatModel, per_row

Model = Callable[[Images], Logits]
State = dict[str, Tensor]

# Margins of points that do not succeed stay below a success's, which is infinite.
LARGEST = 1e300


@dataclass(frozen=True)
class Rows:
    """What stays the same for a row while it is attacked: the clean image, the goal, the rules, the dice.

    `aim` is the goal as the attack's loss sees it: with a target of the attack's own where it tries several.
    `past` (B 2) are the margin of the clean image and the highest margin that earlier attacks of the same run
    came to, `nearest` (B C H W) is the point of the latter; None where nobody knows. Where the threat is minimal
    `nearest` are the nearest points so far that reach the goal, the clean image where there is none.
    """

    x: Images
    goal: Goal
    threat: ThreatModel
    rng: RowRng
    aim: Goal
    past: Tensor | None = None
    nearest: Images | None = None

    def select(self, index: Tensor) -> Rows:
        """Return these rows, by position or mask."""
        return Rows(
            self.x[index],
            self.goal.select(index),
            self.threat,
            self.rng.select(index),
            self.aim.select(index),
            None if self.past is None else self.past[index],
            None if self.nearest is None else self.nearest[index],
        )

    @property
    def reach(self) -> float | Tensor:
        """The threat's radius; where it is minimal, each row's distance of the nearest point so far (B 1 1 1).

        Where there is none it is the distance of the farthest image.
        """
        if not self.threat.minimal:
            return self.threat.radius
        farthest = self.threat.distance((self.x < 0.5).to(self.x.dtype), self.x)
        if self.nearest is not None:
            distance = self.threat.distance(self.nearest, self.x)
            farthest = torch.where(distance > 0, distance, farthest)
        return per_row(farthest, self.x).to(self.x.dtype)

    def random_start(self) -> Images:
        """Return random points of the threat; where it is minimal, at half of each row's reach."""
        if not self.threat.minimal:
            return self.threat.random_start(self.x, self.rng)
        noise = self.rng.normal(*self.x.shape[1:]).to(self.x.dtype)
        length = per_row(self.threat.distance(noise, torch.zeros_like(noise)).to(noise.dtype), noise)
        return (self.x + 0.5 * self.reach * noise / length.clamp(min=1e-12)).clamp(0, 1)

    def near(self, share: float) -> Mask | None:
        """Return which rows have at most this share of their way so far left to the boundary; None: unknown."""
        if self.past is None:
            return None
        clean, nearest = self.past.unbind(1)
        return -nearest <= share * (nearest - clean)


class Answer(NamedTuple):
    """What a query tells: logits (B K), the attack's objective (B) or (B M), and its gradient in x.

    The gradient is (B C H W), or (B M C H W) for an objective of M columns; zero where none was asked for.
    """

    logits: Logits
    loss: Tensor
    gradient: Tensor

    def select(self, index: Tensor) -> Answer:
        """Return the answers to these rows, by position or mask."""
        return Answer(self.logits[index], self.loss[index], self.gradient[index])


class RowWise(ABC):
    """An iterative attack, to be subclassed by a frozen dataclass; the rest follows from `init` and `step`.

    A state may hold two masks (B) that the loop reads: "blind", rows that want no gradient with the next
    answer; and "last", rows whose attempt ends with the next answer, before its full `length`.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def steps(self) -> int:
        """How many gradients an attempt takes."""

    @property
    def restarts(self) -> int | None:
        """How many attempts there are at each target; None leaves it to `attempts`."""
        return 1

    @property
    def loss(self) -> str:
        """The loss that `objective` is, if it is not overridden."""
        return "ce"

    @property
    def draws(self) -> int:
        """How often each point is asked for, answers averaged (for random models)."""
        return 1

    @property
    def blind(self) -> bool:
        """Whether no answer needs a gradient."""
        return False

    @property
    def strays(self) -> bool:
        """Whether queries may lie outside the threat, where they cannot count."""
        return False

    @property
    def last_resort(self) -> bool:
        """Whether it is for images right at the boundary alone, which low precision cannot make out."""
        return False

    @property
    def second_opinion(self) -> bool:
        """Whether it is there to check on gradients by scores, which are luck where a model is random."""
        return False

    @property
    def several(self) -> bool:
        """Whether `objective` may have more columns than one."""
        return False

    def attempts(self, norm: str) -> tuple[int, int]:
        """Return the number of targets (0: the goal's own) and of restarts for each."""
        return 0, self.restarts or 1

    def length(self, norm: str) -> int:
        """Return the most steps that an attempt takes; it asks one answer more."""
        return self.steps

    def enters(self, rows: Rows) -> Mask | None:
        """Return which rows are worth an attempt, by what is known of their past; None: all."""
        return None

    @abstractmethod
    def init(self, rows: Rows) -> State:
        """Return the state before the first query."""

    def objective(self, rows: Rows, state: State, logits: Logits) -> Tensor:
        """Return what the attack wants the gradient of, (B) or (B M)."""
        return rows.aim.loss(logits, self.loss)

    @abstractmethod
    def step(self, rows: Rows, state: State, answer: Answer) -> State:
        """Return the state after the answer to the query at state["x"]."""

    def __call__(
        self,
        model: Model,
        x: Images,
        goal: Goal,
        threat: ThreatModel,
        *,
        rng: RowRng,
        known: Images | None = None,
    ) -> Images:
        """Return for each row its first success, else its point of highest margin in the threat; see `iterate`."""
        return iterate(self, model, x, goal, threat, rng, known)

    def budget(self, num_classes: int, norm: str) -> int:
        """Return the most forwards that one image costs."""
        targets, restarts = self.attempts(norm)
        jobs = min(max(targets, 1), num_classes - 1) * restarts
        return (targets > 0) + jobs * (self.length(norm) + 1) * self.draws


def iterate(
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
    where the threat is minimal it goes on to the last step, and its nearest success is returned. `known` are then
    the nearest that there are already, the clean image where there is none.
    Costs at most `attack.budget` forwards per row, and a backward for all but one of an attempt's.
    """
    x = x.detach()
    found = _Found(x.clone(), torch.full((len(x),), -torch.inf, dtype=torch.float64, device=x.device))
    if known is not None:
        there = (known != x).flatten(1).any(1)
        found.offer(torch.arange(len(x), device=x.device)[there], known[there], threat.worth(known, x)[there])
    targets, restarts = attack.attempts(threat.norm)
    ranked = None
    open_rows = torch.arange(len(x), device=x.device)
    if targets and goal.targets is None and len(x):
        with torch.no_grad():
            logits = model(x).detach()
        ranked = rank(logits, goal.labels, targets)
        reached = goal.reached(logits)
        found.margin[reached] = torch.inf
        open_rows = open_rows[~reached]
    for job in range(restarts * (1 if ranked is None else ranked.shape[1])):
        if not len(open_rows):
            break
        aim = goal if ranked is None else replace(goal, targets=ranked[:, job // restarts])
        nearest = torch.where(per_row(found.margin > 0, x), found.x, x) if threat.minimal else None
        rows = Rows(x, goal, threat, rng.at(restart=job), aim, nearest=nearest).select(open_rows)
        _attempt(attack, model, rows, open_rows, found)
        open_rows = open_rows[found.margin[open_rows] < torch.inf]
    return found.x


@dataclass
class _Found:
    """The best point of each sample so far, and its margin; of a success what that is worth, which is above 0."""

    x: Images
    margin: Tensor

    def offer(self, at: Tensor, x: Images, margin: Tensor) -> None:
        """Take over the points of these samples where they are better."""
        better = margin > self.margin[at]
        self.x[at] = torch.where(per_row(better, x), x, self.x[at])
        self.margin[at] = torch.where(better, margin, self.margin[at])


def _attempt(attack: RowWise, model: Model, rows: Rows, at: Tensor, found: _Found) -> None:
    """Run one job of each row; `at` are the rows' places in `found`."""
    state = attack.init(rows)
    best = state["x"]
    margin = torch.full((len(at),), -torch.inf, dtype=torch.float64, device=at.device)
    length = attack.length(rows.threat.norm)
    for step in range(length + 1):
        answer = ask(attack, model, rows, state, step < length)
        reached = rows.goal.reached(answer.logits)
        short = rows.goal.loss(answer.logits, "margin").double().clamp(max=LARGEST)
        short = torch.full_like(short, -torch.inf) if rows.threat.minimal else short
        now = torch.where(reached, rows.threat.worth(state["x"], rows.x), short)
        if attack.strays:
            now = torch.where(rows.threat.contains(state["x"], rows.x), now, -torch.inf)
        better = now > margin
        best = torch.where(per_row(better, best), state["x"], best)
        margin = torch.where(better, now, margin)
        leave = margin == torch.inf
        if "last" in state:
            leave = leave | state["last"]
        if leave.any():
            found.offer(at[leave], best[leave], margin[leave])
            stay = (~leave).nonzero()[:, 0]
            if not len(stay):
                return
            at, rows, answer = at[stay], rows.select(stay), answer.select(stay)
            best, margin = best[stay], margin[stay]
            state = {name: rows_of[stay] for name, rows_of in state.items()}
        if step < length:
            rows = replace(rows, rng=rows.rng.at(step=step + 1))
            state = attack.step(rows, state, answer)
    found.offer(at, best, margin)


def rank(logits: Logits, labels: Labels, count: int) -> Labels:
    """Return the likeliest classes other than the label, best first, (B, min(count, K - 1))."""
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.sort(dim=1, descending=True, stable=True).indices[:, : min(count, logits.shape[1] - 1)]


def query(model: Model, x: Images, goal: Goal, loss: str, with_gradient: bool = True) -> Answer:
    """Return logits, loss (B) and the loss's gradient in x, by one forward and at most one backward pass."""
    return _query(model, x, lambda logits: goal.loss(logits, loss), with_gradient)


def ask(attack: RowWise, model: Model, rows: Rows, state: State, with_gradient: bool) -> Answer:
    """Return the answers at state["x"]: rows that want no gradient go without, the others with."""
    x = state["x"]
    blind = state.get("blind")
    if blind is None or not with_gradient or attack.blind:
        return _average(attack, model, rows, state, with_gradient and not attack.blind)
    without, wanting = blind.nonzero()[:, 0], (~blind).nonzero()[:, 0]
    if not len(without) or not len(wanting):
        return _average(attack, model, rows, state, not len(without))
    parts = []
    for wants, index in enumerate((without, wanting)):
        part = {name: of_rows[index] for name, of_rows in state.items()}
        parts.append(_average(attack, model, rows.select(index), part, bool(wants)))
    order = torch.cat([without, wanting]).argsort()
    gradient = parts[1].gradient.new_zeros(len(x), *parts[1].gradient.shape[1:])
    return Answer(
        torch.cat([parts[0].logits, parts[1].logits])[order],
        torch.cat([parts[0].loss, parts[1].loss])[order],
        gradient.index_copy(0, wanting, parts[1].gradient),
    )


def _average(attack: RowWise, model: Model, rows: Rows, state: State, with_gradient: bool) -> Answer:
    """Return the mean of as many answers as the attack wants."""
    x = state["x"]

    def objective(logits: Logits) -> Tensor:
        return attack.objective(rows, state, logits)

    first = _query(model, x, objective, with_gradient)
    if attack.draws == 1:
        return first
    answers = [first, *(_query(model, x, objective, with_gradient) for _ in range(attack.draws - 1))]
    return Answer(*(torch.stack(parts).mean(0) for parts in zip(*answers, strict=True)))


def _query(model: Model, x: Images, objective: Callable[[Logits], Tensor], with_gradient: bool) -> Answer:
    with torch.set_grad_enabled(with_gradient):
        x = x.detach().requires_grad_(with_gradient)
        logits = model(x)
        value = objective(logits)
        if not with_gradient:
            gradient = x.new_zeros(()).expand(*value.shape, *x.shape[1:])
        elif value.dim() == 1:
            gradient = finite(torch.autograd.grad(value.sum(), x)[0])
        else:
            columns = value.sum(0)
            slopes = [
                torch.autograd.grad(column, x, retain_graph=number + 1 < len(columns))[0]
                for number, column in enumerate(columns)
            ]
            gradient = finite(torch.stack(slopes, 1))
    return Answer(logits.detach(), value.detach(), gradient)
