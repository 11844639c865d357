"""Momentum on sharpness-aware steps, one half of the common weakness attack (Chen et al. 2024, arXiv:2303.09105).

Follows the paper's section 3.3 (`compat=paper`) and the authors' code (`compat=official`,
huanranchen/AdversarialAttacks at cc24144), which differs: logits are summed and not averaged, the gradient at the
image is added to that after the reverse step, the reverse step is not clipped and not used in targeted attacks,
and the update is that of `mi-fgsm`. Their code has one L1 norm for the batch; here each image has its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robustkit.attack_api import Answer, Model, Oracle, OracleWrapper, Rows, State, Weights, ascend, split_rng
from robustkit.attacks.transfer.mi_fgsm import MIFGSM
from robustkit.core import criteria
from robustkit.core.criteria import Goal
from robustkit.core.errors import did_you_mean
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images
from robustkit.core.step_size import StepSize
from robustkit.core.threat import ThreatModel
from robustkit.registry import attack
from robustkit.registry.ranges import Count, NonNegative, Share

COMPAT = ("paper", "official")


@attack("mi-sam", paper="arXiv:2303.09105", norms=("linf", "l2"), access="gradient", ascent=True)
@dataclass(frozen=True, slots=True)
class MISAM:
    """Each step first moves back, against the attack, and takes the ascent gradient there; two gradients a step.

    `step_size` is `0.2eps` or `2/255px` (none: 2 eps / steps). `reverse`, the reverse step (none: 1/15, the
    official code's 1/10), is a fraction of eps; `momentum` is the share of the sum of steps that each one keeps;
    `compat` is `paper` or `official`.
    """

    steps: Count = 10
    step_size: StepSize | None = None
    reverse: NonNegative | None = None
    momentum: Share = 1.0
    loss: str = "ce"
    compat: str = "paper"

    def __post_init__(self) -> None:
        """Raise UsageError for an unknown `compat`."""
        criteria.loss(self.loss)
        check_word("compat", self.compat, COMPAT)

    def __call__(self, model: Model, x: Images, goal: Goal, threat: ThreatModel, *, rng: RowRng) -> Images:
        """Return the last points."""
        return ascend(self, model, x, goal, threat, rng)

    @property
    def official(self) -> bool:
        """Whether to follow the authors' code."""
        return self.compat == "official"

    @property
    def stride(self) -> StepSize:
        """The step size."""
        return default_stride(self.step_size, self.steps, self.official)

    @property
    def cost(self) -> int:
        """The number of gradients that a step costs."""
        return 2

    def wrap(self, oracle: Oracle) -> Oracle:
        """Return an oracle that returns steps instead of gradients."""
        return _Sharpness(oracle, self)

    def init(self, rows: Rows) -> State:
        """Return the clean images, with velocity zero."""
        return {"x": rows.x, "velocity": torch.zeros_like(rows.x)}

    def step(self, rows: Rows, state: State, answer: Answer) -> State:
        """Return the projected next points: moved by the sum of steps itself, or as `mi-fgsm` does."""
        if self.official:
            return MIFGSM(self.steps, self.stride, self.momentum).step(rows, state, answer)
        velocity = self.momentum * state["velocity"] + answer.gradient
        return {"x": rows.project(state["x"] + velocity), "velocity": velocity}


class _Sharpness(OracleWrapper):
    """Returns each row's sharpness-aware step, or, as the official code does, the sum of its two gradients."""

    def __init__(self, inner: Oracle, rule: MISAM) -> None:
        super().__init__(inner)
        self.rule = rule

    def gradient(
        self,
        rows: Rows,
        x: Images,
        members: Sequence[int] | None = None,
        weights: Weights = None,
    ) -> Images:
        rule, threat = self.rule, rows.threat
        if weights is None and rule.official:
            weights = summed(self, x, members)
        reverse = rule.reverse
        if reverse is None:
            reverse = 1 / 10 if rule.official else 1 / 15
        if rule.official and rows.aim.targets is not None:
            reverse = 0
        first = self.inner.gradient(split_rng(rows, "sam", 0), x, members, weights)
        back = step_back(rows, x, first, reverse)
        if rule.official:
            return first + self.inner.gradient(split_rng(rows, "sam", 1), back, members, weights)
        back = rows.retract(back)
        second = self.inner.gradient(split_rng(rows, "sam", 1), back, members, weights)
        there = back + rule.stride.length(float(threat.eps)) * threat.ascent(second)
        return rows.retract(there) - x


def step_back(rows: Rows, x: Images, gradient: Images, reverse: float) -> Images:
    """Return x after a reverse step of this fraction of eps."""
    return x - reverse * float(rows.threat.eps) * rows.threat.ascent(gradient)


def summed(oracle: Oracle, x: Images, members: Sequence[int] | None) -> Tensor:
    """Return the weights that turn the mean over members into a sum, as in the authors' code."""
    return x.new_ones(len(oracle.surrogates if members is None else members))


def default_stride(step_size: StepSize | None, steps: int, official: bool) -> StepSize:
    """Return the default step size; the authors' code has 1/5 of eps for any number of steps."""
    return step_size or StepSize(1 / 5 if official else 2 / steps)


def check_word(field: str, word: str, known: Sequence[str]) -> None:
    """Raise UsageError if a field's value is not among its choices."""
    if word not in known:
        raise did_you_mean(field, word, known)
