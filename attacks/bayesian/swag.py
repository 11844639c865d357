"""Stochastic weight averaging - Gaussian (Maddox et al. 2019, arXiv:1902.02476).

A normal distribution, with a diagonal plus low-rank covariance, is fitted to the weights at the end of plain
training. Samples are drawn from it and get running statistics of their own. See `robustkit.sampling.Moments`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from robustkit.registry import method
from robustkit.registry.ranges import Count, CountOrZero, NonNegative, ShareBelowOne
from robustkit.sampling import Moments, linear
from robustkit.training.method import Plan, Size
from robustkit.training.posterior_method import PosteriorMethod, State


@method("swag", paper="arXiv:1902.02476")
@dataclass(frozen=True, slots=True)
class SWAG(PosteriorMethod):
    """SGD, then a constant rate; `draws` from a normal fitted to the weights of the late epochs are stored.

    `start` is the share of the epochs before the first one whose weights count; from there on the rate is `lr`
    times `collect_rate`. The normal has the last `rank` deviations from the mean; at rank 0 it is diagonal. Its
    standard deviations are multiplied by `scale`: 1 is the paper's formula, which the authors' code calls 0.5.
    """

    draws: Count = 20
    rank: CountOrZero = 20
    scale: NonNegative = 1.0
    start: ShareBelowOne = 0.53
    collect_rate: NonNegative = 0.1
    momentum: ShareBelowOne = 0.9
    weight_decay: NonNegative = 3e-4
    batch_norm: str = "re-estimate"

    def default_size(self, samples: int) -> Size:
        """Return the paper's size for a PreResNet on CIFAR-10; a shorter run on a small set."""
        if samples > 5000:
            return Size(epochs=300, batch_size=128, lr=0.1)
        return Size(epochs=60, batch_size=64, lr=0.05)

    def rate(self, step: int, plan: Plan) -> float:
        """Return `lr`, then a linear fall to the lowest rate at nine tenths of the way to the first snapshot."""
        first = self._first(plan)
        lowest = plan.lr * self.collect_rate
        return linear(step // plan.steps_per_epoch, first, plan.lr, lowest) if first else lowest

    def keeps(self, step: int, plan: Plan) -> bool:
        """Return whether a step ends an epoch after the start."""
        epoch, left = divmod(step + 1, plan.steps_per_epoch)
        return left == 0 and epoch > self._first(plan)

    def samples(self, kept: Iterable[State], plan: Plan) -> Iterator[State]:
        """Return draws from the normal that was fitted to the stored weights."""
        moments = Moments(kept, self.rank)
        for number in range(self.draws):
            yield moments.draw(number, self.scale, plan.seed)

    def _first(self, plan: Plan) -> int:
        """Return the number of epochs before the first whose weights are used."""
        return min(round(self.start * plan.epochs), plan.epochs - 1)
