"""Plain training: stochastic gradient descent on the cross-entropy, as a baseline."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from robustkit.core.errors import did_you_mean
from robustkit.registry import method
from robustkit.registry.ranges import NonNegative, Share, ShareBelowOne
from robustkit.training.method import Method, Plan, Size

SCHEDULES = ("cosine", "steps", "constant")


@method("standard")
@dataclass(frozen=True, slots=True)
class Standard(Method):
    """SGD with Nesterov momentum; the learning rate rises during the share `warmup` and then follows `schedule`.

    `cosine` falls to 0; `steps` falls to a tenth at a half and again at three quarters of the run (He et al. 2016,
    arXiv:1512.03385); `constant` does not fall.
    """

    schedule: str = "cosine"
    warmup: Share = 0.05
    momentum: ShareBelowOne = 0.9
    weight_decay: NonNegative = 5e-4

    ensembles = True

    def __post_init__(self) -> None:
        """Refuse an unknown schedule."""
        if self.schedule not in SCHEDULES:
            raise did_you_mean("schedule", self.schedule, SCHEDULES)

    def default_size(self, samples: int) -> Size:
        """Return a common size on CIFAR-10; smaller batches and a larger learning rate on a small set."""
        return (
            Size(epochs=30, batch_size=64, lr=0.2) if samples <= 5000 else Size(epochs=30, batch_size=128, lr=0.1)
        )

    def optimizer(self, parameters: Iterable[nn.Parameter], plan: Plan) -> torch.optim.Optimizer:
        """Return SGD."""
        return torch.optim.SGD(
            parameters,
            lr=plan.lr,
            momentum=self.momentum,
            nesterov=self.momentum > 0,
            weight_decay=self.weight_decay,
        )

    def rate(self, step: int, plan: Plan) -> float:
        """Return the learning rate of a step."""
        return plan.lr * self._share((step + 0.5) / plan.steps)

    def _share(self, done: float) -> float:
        if done < self.warmup:
            return done / self.warmup
        if self.schedule == "cosine":
            left = (done - self.warmup) / max(1 - self.warmup, 1e-9)
            return 0.5 * (1 + math.cos(math.pi * left))
        return 0.1 ** ((done > 0.5) + (done > 0.75)) if self.schedule == "steps" else 1.0
