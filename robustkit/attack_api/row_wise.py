"""The base class of iterative attacks, row-wise pure functions that any loop can run; their queries of a model.

An attack subclasses `RowWise` and defines `init(rows) -> state` and `step(rows, state, answer) -> state`. A state
is a dict of tensors with one row for each job, the next query point under "x". No row may depend on another row,
so that rows can be mixed, removed and added; `driver.run_attempts` is the plain loop. A loop sets `rows.rng.step`
to 0 for `init`, to the number of steps taken for `objective`, and to the step's number, from 1, for `step`.

A job is one attempt at one sample: a target (for attacks that try several) and a restart. The attack's loss uses
the row's `aim`; only the sample's own `goal` and the threat decide whether a row has succeeded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from robustkit.attack_api.rows import Answer, Model, Rows, State, select_state
from robustkit.core.criteria import Goal
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images, Labels, Logits
from robustkit.core.threat import ThreatModel


@dataclass(frozen=True)
class LoopOptions:
    """What a loop needs from an attack besides `init` and `step`.

    Attributes:
        steps: the most steps that an attempt takes; it makes one query more.
        targets: how many targets are tried in turn; 0 if the goal's own is the only one.
        restarts: attempts at each target.
        needs_gradient: whether queries need gradients.
        queries_outside_ball: whether queries may lie outside the threat, where they do not count as successes.
        vector_objective: whether `objective` has several columns, each with a gradient of its own.
        eot_samples: how often the model is evaluated at each point; the answers are averaged (expectation over
            transformation, arXiv:1802.00420).
        boundary_only: if not None, the attack is run only on rows whose remaining margin is at most this share of
            the change by earlier attacks, and only in float32.
        score_check: whether the attack checks gradients by scores. It is not run if the model is random, because
            the score of one draw is noisy.
        checkpoints: pairs of a number of queries and a share. As an arm the attack leaves a row after that many
            queries if the margin has risen, but by less than this share of the clean margin.
    """

    steps: int
    targets: int = 0
    restarts: int = 1
    needs_gradient: bool = True
    queries_outside_ball: bool = False
    vector_objective: bool = False
    eot_samples: int = 1
    boundary_only: float | None = None
    score_check: bool = False
    checkpoints: tuple[tuple[int, float], ...] = ()


class RowWise(ABC):
    """An iterative attack, to be subclassed by a frozen dataclass that defines `init` and `step`.

    A field `restarts` is the number of attempts. A state may hold two masks (B) that the loop reads:
    "needs_gradient", rows whose next query needs a gradient (all, if it is absent); and "last", rows whose attempt
    ends with the next query, before its full number of steps.

    Example:
        >>> import torch
        >>> from robustkit import ThreatModel
        >>> from robustkit.core.criteria import Goal
        >>> from robustkit.core.rng import RowRng
        >>> class SignSteps(RowWise):
        ...     steps = 3
        ...     def init(self, rows):
        ...         return {"x": rows.x}
        ...     def step(self, rows, state, answer):
        ...         moved = state["x"] + 0.1 * answer.gradient.sign()
        ...         return {"x": rows.project(moved)}
        >>> x, goal = torch.full((2, 1, 1, 2), 0.5), Goal(torch.tensor([0, 1]))
        >>> threat, rng = ThreatModel.parse("linf:0.25"), RowRng(0, "example", torch.arange(2))
        >>> SignSteps()(lambda x: x.flatten(1), x, goal, threat, rng=rng).shape
        torch.Size([2, 1, 1, 2])
    """

    __slots__ = ()

    @property
    @abstractmethod
    def steps(self) -> int:
        """How many steps an attempt takes."""

    @property
    def loss(self) -> str:
        """The loss that `objective` computes, a name of `robustkit.core.criteria`."""
        return "ce"

    def loop_options(self, norm: str) -> LoopOptions:
        """Return the loop's options for the attack in this norm."""
        restarts: int | None = getattr(self, "restarts", None)
        return LoopOptions(self.steps, restarts=restarts or 1)

    def budget(self, num_classes: int, norm: str) -> int:
        """Return the most forward passes that one image costs."""
        options = self.loop_options(norm)
        jobs = min(max(options.targets, 1), num_classes - 1) * options.restarts
        return (options.targets > 0) + jobs * (options.steps + 1) * options.eot_samples

    @abstractmethod
    def init(self, rows: Rows) -> State:
        """Return the state before the first query."""

    def objective(self, rows: Rows, state: State, logits: Logits) -> Tensor:
        """Return the attack's objective, (B) or (B M), from logits (B K)."""
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
        """Return for each row its first success, else its point of highest margin; see `run_attempts`."""
        from robustkit.attack_api.driver import run_attempts

        return run_attempts(self, model, x, goal, threat, rng, known)


def query(model: Model, x: Images, goal: Goal, loss: str, with_gradient: bool = True) -> Answer:
    """Return logits, loss (B) and the loss's gradient in x, by one forward and at most one backward pass.

    Args:
        model: from images to logits.
        x: images (B C H W).
        goal: the labels, and the targets if there are any.
        loss: a name of `robustkit.core.criteria`.
        with_gradient: whether to compute the gradient; else it is zero.
    """
    return _query(model, x, lambda logits: goal.loss(logits, loss), with_gradient)


def query_rows(attack: RowWise, model: Model, rows: Rows, state: State, with_gradient: bool) -> Answer:
    """Return the answers at state["x"], with gradients for the rows that need one.

    Rows whose mask `needs_gradient` in the state is False, and attacks that never need a gradient, get none.
    """
    options = attack.loop_options(rows.threat.norm)
    with_gradient = with_gradient and options.needs_gradient

    def ask(index: Tensor | None, with_gradient: bool) -> Answer:
        chosen, part = (rows, state) if index is None else (rows.select(index), select_state(state, index))
        answers = [
            _query(model, part["x"], lambda logits: attack.objective(chosen, part, logits), with_gradient)
            for _ in range(options.eot_samples)
        ]
        if len(answers) == 1:
            return answers[0]
        return Answer(*(torch.stack(parts).mean(0) for parts in zip(*answers, strict=True)))

    if "needs_gradient" not in state or not with_gradient:
        return ask(None, with_gradient)
    needs = state["needs_gradient"]
    without, wanting = (~needs).nonzero()[:, 0], needs.nonzero()[:, 0]
    if not len(without) or not len(wanting):
        return ask(None, not len(without))
    return merge_answers([(without, ask(without, False)), (wanting, ask(wanting, True))])


def merge_answers(parts: list[tuple[Tensor, Answer]]) -> Answer:
    """Return the answers to all rows in order, from parts with their positions."""
    if len(parts) == 1:
        return parts[0][1]
    order = torch.cat([index for index, _ in parts]).argsort()
    return Answer(*(torch.cat(fields)[order] for fields in zip(*(answer for _, answer in parts), strict=True)))


def rank(logits: Logits, labels: Labels, count: int) -> Labels:
    """Return the likeliest classes other than the label, best first, (B, min(count, K - 1))."""
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.sort(dim=1, descending=True, stable=True).indices[:, : min(count, logits.shape[1] - 1)]


def finite(gradient: Tensor) -> Tensor:
    """Return a gradient with 0 in place of infinite values and NaN, which would make the image's step NaN."""
    return gradient.nan_to_num(0.0, 0.0, 0.0)


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
