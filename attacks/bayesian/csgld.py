"""Cyclical stochastic-gradient Langevin dynamics as a source of surrogates (Gubri et al. 2022, arXiv:2011.05074).

The sampler is that of Zhang et al. (2020, arXiv:1902.03932). The authors of the attack scale the noise by 1 over
the batches of an epoch, so that the batch size sets the temperature of the posterior; here `temperature` is a
field and the scale follows from it: with the mean cross-entropy as loss, the noise of a step has variance
2 x rate x temperature / N in each weight, N the number of training images. The default corresponds to their code
on CIFAR-10 at batch size 64.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from robustkit.core.errors import UsageError
from robustkit.registry import method
from robustkit.registry.ranges import Count, CountOrZero, NonNegative, ShareBelowOne
from robustkit.sampling import Langevin, cyclical
from robustkit.training.method import Plan, Size
from robustkit.training.posterior_method import PosteriorMethod


@method("csgld", paper="arXiv:2011.05074")
@dataclass(frozen=True, slots=True)
class CSGLD(PosteriorMethod):
    """Cosine cycles of the learning rate from a warm start; the last epochs of each are noisy and are kept.

    `temperature` is the posterior's: 1 is the Bayesian posterior, 0 is no noise; it does not depend on the batch
    size. With `batch_norm` `keep` a sample has the running statistics of its step, with `re-estimate` new ones.
    With `momentum` above 0 it is cyclical SGHMC of friction 1 - momentum. Images are normalised as the run's model
    requires; the authors' code uses images in [0, 1].
    """

    cycles: Count = 5
    samples_per_cycle: Count = 3
    noise_epochs: CountOrZero = 3
    temperature: NonNegative = 0.08
    momentum: ShareBelowOne = 0.0
    weight_decay: NonNegative = 3e-4
    batch_norm: str = "keep"

    def default_size(self, samples: int) -> Size:
        """Return the paper's size on CIFAR-10; shorter cycles on a small set."""
        return Size(epochs=(50 if samples > 5000 else 16) * self.cycles, batch_size=64, lr=0.5)

    def check_plan(self, plan: Plan) -> None:
        """Raise UsageError for cycles that are not whole epochs, or too short for their samples."""
        PosteriorMethod.check_plan(self, plan)
        name = self.info.name
        if plan.epochs % self.cycles:
            raise UsageError(
                f"{name}: {plan.epochs} epochs cannot be divided into {self.cycles} equal cycles; use a multiple."
            )
        if self.samples_per_cycle > plan.epochs // self.cycles:
            raise UsageError(
                f"{name}: samples_per_cycle={self.samples_per_cycle} is more than the "
                f"{plan.epochs // self.cycles} epochs of a cycle; use fewer, or more --epochs."
            )

    def optimizer(self, parameters: Iterable[nn.Parameter], plan: Plan) -> torch.optim.Optimizer:
        """Return SGD with Langevin noise."""
        return Langevin(
            parameters,
            plan.lr,
            samples=plan.samples,
            temperature=self.temperature,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            seed=plan.seed,
        )

    def rate(self, step: int, plan: Plan) -> float:
        """Return half a cosine from `lr` towards 0 in each cycle."""
        return cyclical(step, plan.steps // self.cycles, plan.lr)

    def noisy(self, step: int, plan: Plan) -> bool:
        """Return whether a step is in the last `noise_epochs` of its cycle."""
        return self._epochs_left(step, plan) <= self.noise_epochs

    def keeps(self, step: int, plan: Plan) -> bool:
        """Return whether a step ends one of the last `samples_per_cycle` epochs of its cycle."""
        ends = (step + 1) % plan.steps_per_epoch == 0
        return ends and self._epochs_left(step, plan) <= self.samples_per_cycle

    def cycle(self, step: int, plan: Plan) -> int:
        """Return which cycle a step is in, from 0."""
        return step // (plan.steps // self.cycles)

    def _epochs_left(self, step: int, plan: Plan) -> int:
        """Return how many epochs of its cycle are not over before a step; the last has 1."""
        cycle = plan.epochs // self.cycles
        return cycle - step // plan.steps_per_epoch % cycle
