"""Preconditioned SGLD (Li et al. 2016, arXiv:1512.07666); see `robustkit.sampling.PreconditionedLangevin`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import nn

from robustkit.attacks.bayesian.sgld import SGLD
from robustkit.core.limits import Limits
from robustkit.registry import method
from robustkit.registry.ranges import ShareBelowOne
from robustkit.sampling import PreconditionedLangevin
from robustkit.training.method import Plan, Size


@method("psgld", paper="arXiv:1512.07666")
@dataclass(frozen=True, slots=True)
class PSGLD(SGLD):
    """`sgld` with each weight's step and noise divided by the root mean square of its gradients.

    `decay` is the share of the mean square that is kept at each step; `damping` is added to its root.
    """

    decay: ShareBelowOne = 0.99
    damping: Annotated[float, Limits(1e-12)] = 1e-5

    def default_size(self, samples: int) -> Size:
        """Return the epochs of `csgld` on CIFAR-10 and a rate like the paper's; a shorter run on a small set."""
        return Size(epochs=250 if samples > 5000 else 80, batch_size=64, lr=0.001)

    def optimizer(self, parameters: Iterable[nn.Parameter], plan: Plan) -> torch.optim.Optimizer:
        """Return preconditioned descent with Langevin noise."""
        return PreconditionedLangevin(
            parameters,
            plan.lr,
            samples=plan.samples,
            temperature=self.temperature,
            decay=self.decay,
            damping=self.damping,
            weight_decay=self.weight_decay,
            seed=plan.seed,
        )
