"""Variance tuning (Wang and He 2021, arXiv:2103.15571): gradients corrected by the variance of the last one.

`vmi-mean` is what the code of the common weakness attack (arXiv:2303.09105, huanranchen/AdversarialAttacks at
38b33dc) has under this name: the mean over neighbours, without the point itself and without a memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from robustkit.attack_api import Oracle, OracleWrapper, Rows, Technique, Weights, random_neighbour, split_rng
from robustkit.core.errors import did_you_mean
from robustkit.core.shapes import Images
from robustkit.registry import recipe, technique
from robustkit.registry.ranges import Count, NonNegative


@recipe("vmi-fgsm", paper="arXiv:2103.15571")
def vmi_fgsm() -> str:
    """Momentum with variance tuning."""
    return "mi-fgsm+vmi"


@technique("vmi", paper="arXiv:2103.15571")
@dataclass(frozen=True, slots=True)
class VMI(Technique):
    """Adds the difference of the last step between the mean gradient of `copies` neighbours and the gradient.

    Neighbours are drawn uniformly within `beta` times eps. Costs copies + 1 gradients a step, but 1 in the last,
    whose neighbours are not needed. Gradients of single members have a memory for each member.
    """

    copies: Count = 20
    beta: NonNegative = 1.5

    @property
    def cost(self) -> int:
        """The cost in gradients: the point and its neighbours."""
        return self.copies + 1

    def wrap(self, inner: Oracle) -> Oracle:
        """Return an oracle that remembers its last step."""
        return _Tuned(inner, self)


class _Tuned(OracleWrapper):
    def __init__(self, inner: Oracle, technique: VMI) -> None:
        super().__init__(inner)
        self.technique = technique
        self.last: dict[tuple[int, ...] | None, tuple[Rows, Images, Weights, Images]] = {}

    def gradient(
        self, rows: Rows, x: Images, members: Sequence[int] | None = None, weights: Weights = None
    ) -> Images:
        chosen = None if members is None else tuple(members)
        gradient = self.inner.gradient(split_rng(rows, "vmi"), x, members, weights)
        before = self.last.get(chosen)
        self.last[chosen] = rows, x, weights, gradient
        return gradient if before is None else gradient + self._variance(members, *before)

    def _variance(
        self, members: Sequence[int] | None, rows: Rows, x: Images, weights: Weights, gradient: Images
    ) -> Images:
        total = torch.zeros_like(x)
        for number in range(1, self.technique.copies + 1):
            own = split_rng(rows, "vmi", number)
            total = total + self.inner.gradient(
                own, random_neighbour(own, x, self.technique.beta), members, weights
            )
        return total / self.technique.copies - gradient


# The gradients whose mean `vmi-mean` can take.
VARIANCE_OF = ("gradient", "member", "step")


@technique("vmi-mean", paper="arXiv:2303.09105")
@dataclass(frozen=True, slots=True)
class VMIMean(Technique):
    """The mean gradient at `copies` neighbours, drawn uniformly within `beta` times eps.

    `of=member` averages only gradients of single members; `of=step` averages whole steps, each from its own
    neighbour and with its own memory (VMI_Inner_CommonWeakness and VMI_Outer_CommonWeakness in that code).
    """

    copies: Count = 20
    beta: NonNegative = 1.5
    of: str = "gradient"

    def __post_init__(self) -> None:
        """Raise UsageError for an unknown `of`."""
        if self.of not in VARIANCE_OF:
            raise did_you_mean("of", self.of, VARIANCE_OF)

    @property
    def cost(self) -> int:
        """The cost in gradients: one a neighbour."""
        return self.copies

    @property
    def outermost(self) -> bool:
        """Whether it wraps the whole attack rule."""
        return self.of == "step"

    def wrap(self, inner: Oracle) -> Oracle:
        """Return an oracle that takes the gradient at each neighbour."""
        return _Mean([inner] * self.copies, self)

    def wrap_each(self, make: Callable[[], Oracle]) -> Oracle:
        """Return an oracle that wraps another one for each neighbour."""
        return _Mean([make() for _ in range(self.copies)], self)


class _Mean(OracleWrapper):
    def __init__(self, inner: Sequence[Oracle], technique: VMIMean) -> None:
        super().__init__(inner[0])
        self.each, self.technique = inner, technique

    def gradient(
        self, rows: Rows, x: Images, members: Sequence[int] | None = None, weights: Weights = None
    ) -> Images:
        if self.technique.of == "member" and (members is None or len(members) > 1):
            return self.inner.gradient(rows, x, members, weights)
        total = torch.zeros_like(x)
        for number, oracle in enumerate(self.each):
            own = split_rng(rows, "vmi-mean", number)
            total = total + oracle.gradient(own, random_neighbour(own, x, self.technique.beta), members, weights)
        return total / len(self.each)
