"""The common shape of iterative attacks: two row-wise pure functions and one loop that runs any of them.

An attack gives `init(rows) -> state` and `step(rows, state, logits, gradient) -> state`. A state is a dict of
tensors with one row per job, the next query point under "x". Nothing in it may look at another row, so a
scheduler can mix, drop and refill rows freely; `iterate` is the plain loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from robustkit.goal import Goal
from robustkit.rng import RowRng
from robustkit.shapes import Images, Logits
from robustkit.threat import ThreatModel

Model = Callable[[Images], Logits]
State = dict[str, Tensor]


@dataclass(frozen=True)
class Rows:
    """What stays the same for a row while it is attacked: the clean image, the goal, the rules, the dice."""

    x: Images
    goal: Goal
    threat: ThreatModel
    rng: RowRng

    def select(self, index: Tensor) -> Rows:
        """Return these rows, by position or mask."""
        return Rows(self.x[index], self.goal.select(index), self.threat, self.rng.select(index))


class RowWise(Protocol):
    """An iterative attack: `loss` names what it ascends, `steps` counts its gradients per restart."""

    @property
    def steps(self) -> int: ...  # noqa: D102
    @property
    def restarts(self) -> int: ...  # noqa: D102
    @property
    def loss(self) -> str: ...  # noqa: D102

    def init(self, rows: Rows) -> State:
        """Return the state before the first query."""

    def step(self, rows: Rows, state: State, logits: Logits, gradient: Images) -> State:
        """Return the state after the answer to the query at state["x"]."""


def iterate(attack: RowWise, model: Model, x: Images, goal: Goal, threat: ThreatModel, rng: RowRng) -> Images:
    """Run an iterative attack; return for each row its first success, else its point of highest loss.

    A row that succeeds leaves at once. Costs at most `restarts * (steps + 1)` forwards and
    `restarts * steps` backwards per row.
    """
    x = x.detach()
    result = x.clone()
    best = torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
    open_rows = torch.arange(len(x), device=x.device)
    if not len(x):
        return result
    for restart in range(attack.restarts):
        rows = Rows(x, goal, threat, rng.at(restart=restart)).select(open_rows)
        state = attack.init(rows)
        for step in range(attack.steps + 1):
            logits, loss, gradient = query(model, state["x"], rows.goal, attack.loss, step < attack.steps)
            reached = rows.goal.reached(logits)
            better = reached | (loss > best[open_rows])
            result[open_rows[better]] = state["x"][better]
            best[open_rows[better]] = loss[better].to(best.dtype)
            if reached.any():
                stay = ~reached
                open_rows, rows = open_rows[stay], rows.select(stay)
                if not len(open_rows):
                    return result
                state = {name: rows_of[stay] for name, rows_of in state.items()}
                logits, gradient = logits[stay], gradient[stay]
            if step < attack.steps:
                rows = Rows(rows.x, rows.goal, threat, rows.rng.at(step=step + 1))
                state = attack.step(rows, state, logits, gradient)
    return result


def query(
    model: Model, x: Images, goal: Goal, loss: str, with_gradient: bool = True
) -> tuple[Logits, Tensor, Images]:
    """Return logits, loss (B) and the loss's gradient in x, by one forward and at most one backward pass.

    Without `with_gradient` the gradient comes back as `x` itself, to be ignored.
    """
    with torch.set_grad_enabled(with_gradient):
        x = x.detach().requires_grad_(with_gradient)
        logits = model(x)
        value = goal.loss(logits, loss)
    gradient = torch.autograd.grad(value.sum(), x)[0] if with_gradient else x
    return logits.detach(), value.detach(), gradient
