"""Cosine similarity encourager with momentum, the other half of the common weakness attack (arXiv:2303.09105).

Follows the paper's section 3.4 and Algorithm 1 (`compat=paper`) and the authors' code (`compat=official`,
huanranchen/AdversarialAttacks at cc24144), which divides the change made by the inner loop by its L1 norm. Their
norm is that of the whole batch, NaN if one image has no gradient; here each image has its own norm, and a zero
gradient gives no step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from robustkit.attack_api import Answer, Model, Oracle, OracleWrapper, Rows, State, Weights, ascend, split_rng
from robustkit.attacks.common_weakness.mi_sam import COMPAT, check_word, default_stride
from robustkit.attacks.transfer.mi_fgsm import MIFGSM
from robustkit.core import criteria
from robustkit.core.criteria import Goal
from robustkit.core.errors import UsageError
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images
from robustkit.core.step_size import StepSize
from robustkit.core.threat import ThreatModel, per_row, unit
from robustkit.registry import attack
from robustkit.registry.ranges import Count, NonNegative, Share

ORDERS = ("fixed", "random", "antithetic")
UPDATES = ("momentum", "plain", "adam")


@attack("mi-cse", paper="arXiv:2303.09105", norms=("linf", "l2"), access="gradient", ascent=True)
@dataclass(frozen=True, slots=True)
class MICSE:
    """Each step moves towards the end point of an inner loop of one small step along each member's gradient.

    A small step is `beta` times eps (in linf also times the root of the number of pixel values) along a unit
    gradient; the default 2.05 is the paper's 50 at 16/255 and 224 pixels. `beta_raw` is the same in pixel units.
    With `raw` gradients are not normalised. `inner_momentum` is kept for the whole run. `order` of the members:
    `fixed` as listed, `random` for each step (the same for all images, so that a member is used once),
    `antithetic` forwards and backwards, averaged, for twice the gradients. `step_size` is `0.2eps` or `2/255px`
    (none: 2 eps / steps). With `update=plain` the outer step has no sign or norm, and `step_size`, which then has
    no unit, multiplies it (none: 1). With `update=adam` it is a step of Adam instead of momentum and sign, of
    `step_size` (as published: `0.001px`, the official default) with moments 0.9 and 0.999.
    """

    steps: Count = 10
    step_size: StepSize | None = None
    beta: NonNegative | None = None
    beta_raw: NonNegative | None = None
    raw: bool = False
    momentum: Share = 1.0
    inner_momentum: Share = 1.0
    order: str = "fixed"
    update: str = "momentum"
    loss: str = "ce"
    compat: str = "paper"

    def __post_init__(self) -> None:
        """Raise UsageError for an unknown `order`, `update` or `compat`, and for two betas."""
        criteria.loss(self.loss)
        check_word("order", self.order, ORDERS)
        check_word("update", self.update, UPDATES)
        check_word("compat", self.compat, COMPAT)
        if self.update == "plain" and self.step_size and self.step_size.unit == "px":
            raise UsageError(
                f"step_size={self.step_size} is a share of the outer step with update=plain; remove px."
            )
        if self.beta is not None and self.beta_raw is not None:
            raise UsageError(
                f"beta={self.beta} and beta_raw={self.beta_raw} set the same value; give only one of them."
            )

    def __call__(self, model: Model, x: Images, goal: Goal, threat: ThreatModel, *, rng: RowRng) -> Images:
        """Return the last points."""
        return ascend(self, model, x, goal, threat, rng)

    @property
    def official(self) -> bool:
        """Whether to follow the authors' code."""
        return self.compat == "official"

    @property
    def default_beta(self) -> float:
        """The default of `beta`."""
        return 2.05

    @property
    def cost(self) -> int:
        """The cost of a step in gradients of all members."""
        return 2 if self.order == "antithetic" else 1

    def small_step(self, rows: Rows) -> float:
        """Return the length of an inner step in pixel units: in linf a fraction of the ball's half diagonal."""
        if self.beta_raw is not None:
            return self.beta_raw
        beta = self.default_beta if self.beta is None else self.beta
        corner = math.sqrt(math.prod(rows.x.shape[1:])) if rows.threat.norm == "linf" else 1.0
        return beta * float(rows.threat.eps) * corner

    def orders(self, rows: Rows, members: Sequence[int]) -> list[list[int]]:
        """Return the orders of the members in this step; their results are averaged."""
        listed = list(members)
        if self.order == "random":
            # One order for all rows, from no row's own random numbers; on the CPU, where the loop needs it.
            shared = replace(split_rng(rows, "order").rng, ids=torch.zeros(1, dtype=torch.int64))
            return [[listed[index] for index in shared.uniform(len(listed))[0].argsort().tolist()]]
        return [listed, listed[::-1]] if self.order == "antithetic" else [listed]

    def start(
        self, oracle: Oracle, rows: Rows, x: Images, members: Sequence[int] | None, weights: Weights
    ) -> Images:
        """Return the first point of the inner loop."""
        return x

    def wrap(self, oracle: Oracle) -> Oracle:
        """Return the inner loop, which returns its change of x instead of a gradient."""
        return _InnerLoop(oracle, self)

    def init(self, rows: Rows) -> State:
        """Return the clean images, with velocity zero."""
        state = {"x": rows.x, "velocity": torch.zeros_like(rows.x)}
        if self.update == "adam":
            state |= {"square": torch.zeros_like(rows.x), "taken": rows.x.new_zeros(len(rows.x))}
        return state

    def step(self, rows: Rows, state: State, answer: Answer) -> State:
        """Return the projected next points."""
        if self.update == "adam":
            return self._adam(rows, state, answer.gradient)
        if self.update == "plain":
            velocity = self.momentum * state["velocity"] + answer.gradient
            moved = state["x"] + (self.step_size.number if self.step_size else 1) * velocity
            return {"x": rows.project(moved), "velocity": velocity}
        stride = default_stride(self.step_size, self.steps, self.official)
        if self.official:
            return MIFGSM(self.steps, stride, self.momentum).step(rows, state, answer)
        velocity = self.momentum * state["velocity"] + answer.gradient
        moved = state["x"] + stride.length(float(rows.threat.eps)) * rows.threat.ascent(velocity)
        return {"x": rows.project(moved), "velocity": velocity}

    def _adam(self, rows: Rows, state: State, gained: Images) -> State:
        """Return the state after a step of Adam (Kingma & Ba 2015, arXiv:1412.6980)."""
        taken = state["taken"] + 1
        velocity = 0.9 * state["velocity"] + 0.1 * gained
        square = 0.999 * state["square"] + 0.001 * gained.square()
        mean = velocity / per_row(1 - 0.9**taken, velocity)
        spread = (square / per_row(1 - 0.999**taken, square)).sqrt() + 1e-8
        if self.official and self.step_size is None:
            rate = 1e-3
        else:
            stride = default_stride(self.step_size, self.steps, self.official)
            rate = stride.length(float(rows.threat.eps))
            if rows.threat.norm == "l2":  # a step of about 1 in each coordinate has this length
                rate /= math.sqrt(math.prod(rows.x.shape[1:]))
        moved = rows.project(state["x"] + rate * mean / spread)
        return {"x": moved, "velocity": velocity, "square": square, "taken": taken}


class _InnerLoop(OracleWrapper):
    """Takes one small step along each member's gradient in turn; keeps one momentum for each order."""

    def __init__(self, inner: Oracle, rule: MICSE) -> None:
        super().__init__(inner)
        self.rule = rule
        self.velocities: dict[int, Images] = {}

    def gradient(
        self,
        rows: Rows,
        x: Images,
        members: Sequence[int] | None = None,
        weights: Weights = None,
    ) -> Images:
        """Return each row's change of x; a member's step is proportional to its weight."""
        rule, chosen = self.rule, list(range(len(self.surrogates)) if members is None else members)
        shares = self.surrogates.shares(chosen, weights, x)
        paces = dict(zip(chosen, shares / shares.mean(0), strict=True))
        start = rule.start(self.inner, rows, x, members, weights)
        length, queries = rule.small_step(rows), 0
        ends = []
        for walk, order in enumerate(rule.orders(rows, chosen)):
            point, velocity = start, self.velocities.get(walk, torch.zeros_like(x))
            for member in order:
                gradient = self.inner.gradient(split_rng(rows, "cse", queries), point, [member])
                along = gradient if rule.raw else unit(gradient)
                velocity = rule.inner_momentum * velocity + per_row(paces[member], x) * along
                point = rows.retract(point + length * velocity)
                queries += 1
            self.velocities[walk] = velocity
            ends.append(point - x)
        return sum(ends[1:], ends[0]) / len(ends)
