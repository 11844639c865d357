"""TRADES (Zhang et al. 2019, arXiv:1901.08573): clean cross-entropy, and a penalty on changes around images.

Batch norms use their running statistics while images are perturbed, as in the authors' code. With an ensemble, the
perturbation changes its mean probabilities, and the penalty is that of every member.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.core.shapes import Images
from robustkit.core.step_size import StepSize
from robustkit.defenses.adversarial_training.base import PerturbedTraining
from robustkit.registry import method
from robustkit.registry.ranges import Count, NonNegative, ShareBelowOne
from robustkit.training import ensemble_utils
from robustkit.training.method import Batch, Plan


@method("trades", paper="arXiv:1901.08573")
@dataclass(frozen=True, slots=True)
class TRADES(PerturbedTraining):
    """Cross-entropy and `beta` times the divergence between the probabilities at clean and at perturbed images.

    The ascent starts from normal noise of standard deviation `start`. A step has the length `step_size`:
    `0.25eps`, or `2/255px` in pixel units.
    """

    beta: NonNegative = 6.0
    threat: str = "linf:0.031"
    steps: Count = 10
    step_size: StepSize = StepSize(0.226)
    start: NonNegative = 0.001
    momentum: ShareBelowOne = 0.9
    weight_decay: NonNegative = 2e-4

    def rate(self, step: int, plan: Plan) -> float:
        """Return `lr`, a tenth of it from three quarters and a hundredth from nine tenths of the run."""
        done = step / plan.steps
        return float(plan.lr * 0.1 ** ((done >= 0.75) + (done >= 0.9)))

    def losses(self, nets: Sequence[nn.Module], batch: Batch, plan: Plan) -> list[Tensor]:
        """Return each member's cross-entropy and `beta` times its divergence at the perturbed images."""
        with ensemble_utils.batch_norm_policy(nets, "frozen"):
            nearby = self._nearby(nets, batch)
        losses = []
        for net in nets:
            clean, other = net(batch.x), net(nearby)
            distance = divergence(clean.log_softmax(1), other.log_softmax(1)).mean()
            losses.append(F.cross_entropy(clean, batch.y) + self.beta * distance)
        return losses

    def _nearby(self, nets: Sequence[nn.Module], batch: Batch) -> Images:
        """Return images in the ball at which the ensemble's mean probabilities diverge from the clean ones."""

        def ensemble(x: Images) -> Tensor:
            return ensemble_utils.ensemble_log_probabilities(torch.stack([net(x) for net in nets]))

        with torch.no_grad():
            clean = ensemble(batch.x)
        start = self.noisy_images(batch, self.start)
        return self.perturbed(lambda x: divergence(clean, ensemble(x)), start, batch)


def divergence(one: Tensor, other: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence (B) between the rows of two log-probabilities (B K)."""
    return (one.exp() * (one - other)).sum(1)
