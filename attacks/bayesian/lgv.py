"""Large geometric vicinity (Gubri et al. 2022, arXiv:2207.13129): snapshots of SGD at a constant high rate.

The paper starts from a trained net; here the epochs before the last `collect_epochs` train it, with a cosine
learning rate from `lr`. If there are no such epochs, the run starts at the weights of `--arch MODEL@WEIGHTS`.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from robustkit.core.errors import UsageError
from robustkit.registry import method
from robustkit.registry.ranges import Count, NonNegative, ShareBelowOne
from robustkit.sampling import check_count, cosine, is_evenly_spaced
from robustkit.training.method import Plan, Size
from robustkit.training.posterior_method import PosteriorMethod


class Collecting(PosteriorMethod):
    """Base of `lgv` and `mba`: plain training, then SGD at a constant rate, whose weights are stored."""

    __slots__ = ()

    collect_epochs: Count
    momentum: ShareBelowOne
    weight_decay: NonNegative

    def check_plan(self, plan: Plan) -> None:
        """Raise UsageError for fewer epochs than are collected."""
        PosteriorMethod.check_plan(self, plan)
        name = self.info.name
        if self.collect_epochs > plan.epochs:
            raise UsageError(
                f"{name}: collect_epochs={self.collect_epochs} must be at most the run's {plan.epochs} epochs; "
                "write more --epochs."
            )

    def rate(self, step: int, plan: Plan) -> float:
        """Return a cosine from `lr` to 0, and a constant share of `lr` in the last epochs."""
        first = self.first(plan)
        return cosine(step, first, plan.lr) if step < first else plan.lr * self.share(plan)

    @abstractmethod
    def share(self, plan: Plan) -> float:
        """Return the rate of the last epochs as a share of `lr`."""

    def first(self, plan: Plan) -> int:
        """Return the first step of the last epochs."""
        return (plan.epochs - self.collect_epochs) * plan.steps_per_epoch


@method("lgv", paper="arXiv:2207.13129")
@dataclass(frozen=True, slots=True)
class LGV(Collecting):
    """Plain training, then SGD at `lr` times `collect_rate`, stored `snapshots_per_epoch` times an epoch."""

    collect_epochs: Count = 10
    snapshots_per_epoch: Count = 4
    collect_rate: NonNegative = 0.5
    momentum: ShareBelowOne = 0.9
    weight_decay: NonNegative = 1e-4
    batch_norm: str = "keep"

    def default_size(self, samples: int) -> Size:
        """Return a common training size and the paper's epochs after it; a shorter run on a small set."""
        if samples > 5000:
            return Size(epochs=100 + self.collect_epochs, batch_size=256, lr=0.1)
        batch_size = max(min(64, samples // max(self.snapshots_per_epoch, 1)), 1)
        return Size(epochs=40 + self.collect_epochs, batch_size=batch_size, lr=0.05)

    def check_plan(self, plan: Plan) -> None:
        """Raise UsageError for fewer epochs than are collected, or fewer steps in an epoch than snapshots."""
        Collecting.check_plan(self, plan)
        check_count(self.info.name, "snapshots_per_epoch", self.snapshots_per_epoch, plan.steps_per_epoch)

    def share(self, plan: Plan) -> float:
        """Return the field."""
        return self.collect_rate

    def keeps(self, step: int, plan: Plan) -> bool:
        """Return whether the weights after a step are stored: steps evenly spaced in the last epochs."""
        first = self.first(plan)
        return is_evenly_spaced(step - first, plan.steps - first, self.collect_epochs * self.snapshots_per_epoch)
