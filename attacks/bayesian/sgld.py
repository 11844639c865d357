"""Stochastic-gradient Langevin dynamics, one long chain (Welling & Teh, ICML 2011).

`temperature` scales the posterior that is sampled: 1 is the Bayesian posterior (see `robustkit.sampling`). The
paper's step sizes a (b + t)^-power count steps; here time is in epochs and b is 1, so that `lr` is the first rate.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from robustkit.registry import method
from robustkit.registry.ranges import Count, NonNegative, ShareBelowOne
from robustkit.sampling import Langevin, check_count, is_evenly_spaced, polynomial
from robustkit.training.method import Plan, Size
from robustkit.training.posterior_method import PosteriorMethod


@method("sgld", paper="Welling & Teh, ICML 2011")
@dataclass(frozen=True, slots=True)
class SGLD(PosteriorMethod):
    """Noise in every step and a rate that falls as a power; stores `snapshots` evenly after the burn-in."""

    snapshots: Count = 15
    burn_in: ShareBelowOne = 0.7
    power: NonNegative = 0.55
    temperature: NonNegative = 0.08
    weight_decay: NonNegative = 3e-4
    batch_norm: str = "keep"

    def default_size(self, samples: int) -> Size:
        """Return the size of `csgld` on CIFAR-10; a shorter run on a small set."""
        return Size(epochs=250 if samples > 5000 else 80, batch_size=64, lr=0.5)

    def check_plan(self, plan: Plan) -> None:
        """Raise UsageError for invalid fields, and for more snapshots than steps."""
        PosteriorMethod.check_plan(self, plan)
        name = self.info.name
        check_count(name, "snapshots", self.snapshots, plan.steps - self._burnt(plan))

    def optimizer(self, parameters: Iterable[nn.Parameter], plan: Plan) -> torch.optim.Optimizer:
        """Return SGD with Langevin noise."""
        return Langevin(
            parameters,
            plan.lr,
            samples=plan.samples,
            temperature=self.temperature,
            weight_decay=self.weight_decay,
            seed=plan.seed,
        )

    def rate(self, step: int, plan: Plan) -> float:
        """Return the power law of the time in epochs."""
        return polynomial(step / plan.steps_per_epoch, plan.lr, self.power)

    def noisy(self, step: int, plan: Plan) -> bool:
        """Return True: every step has noise."""
        return True

    def keeps(self, step: int, plan: Plan) -> bool:
        """Return whether the weights after a step are stored: evenly spaced steps after the burn-in."""
        burnt = self._burnt(plan)
        return is_evenly_spaced(step - burnt, plan.steps - burnt, self.snapshots)

    def _burnt(self, plan: Plan) -> int:
        return int(self.burn_in * plan.steps)
