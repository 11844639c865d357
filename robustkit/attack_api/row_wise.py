"""The base class of iterative attacks: row-wise pure functions that any loop can run.

An attack subclasses `RowWise` and defines `init(rows) -> state` and `step(rows, state, answer) -> state`. A state
is a dict of tensors with one row for each job, the next query point under "x". No row may depend on another row,
so that a scheduler can mix, drop and refill rows; `attempts.run_attempts` is the plain loop.

A job is one attempt at one sample: a target (for attacks that try several) and a restart. The attack's loss uses
the row's `aim`; only the sample's own `goal` and the threat decide whether a row has succeeded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from robustkit.attack_api.attempts import run_attempts
from robustkit.attack_api.rows import Answer, Model, Rows, State
from robustkit.core.criteria import Goal
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images, Logits
from robustkit.core.threat import ThreatModel


@dataclass(frozen=True)
class LoopOptions:
    """What a loop has to know of an attack beside `init` and `step`.

    Attributes:
        steps: the most steps that an attempt takes; it makes one query more.
        targets: how many targets are tried in turn; 0 if the goal's own is the only one.
        restarts: attempts at each target.
        needs_gradient: whether queries need gradients at all.
        queries_outside_ball: whether queries may lie outside the threat, where they are no successes.
        vector_objective: whether `objective` has several columns, each with a gradient of its own.
        eot_samples: how often the model is evaluated at each point; the answers are averaged (expectation over
            transformation, arXiv:1802.00420).
        boundary_only: if not None, the attack is run only on rows that have at most this share of the way to
            the boundary left after earlier attacks, and only by a search in float32.
        score_check: whether the attack is there to check gradients by scores. It is left out where the model is
            random, since the score of one draw says little.
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
        ...         return {"x": rows.threat.project(moved, rows.x)}
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
        """Return what a loop has to know of the attack in this norm."""
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
        """Return what the attack takes the gradient of, (B) or (B M), from logits (B K)."""
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
        return run_attempts(self, model, x, goal, threat, rng, known)
