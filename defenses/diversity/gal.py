"""Gradient alignment loss (Kariyappa & Qureshi 2019, arXiv:1901.09981): a penalty on aligned input gradients.

The paper also uses leaky ReLUs, which are a choice of architecture here (`--arch`). It adds noise to half of the
batches, this method to half of the images.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustkit.registry import method
from robustkit.registry.ranges import NonNegative
from robustkit.training import ensemble_utils
from robustkit.training.method import Batch, Method, Plan, Size


@method("gal", paper="arXiv:1901.09981")
@dataclass(frozen=True, slots=True)
class GAL(Method):
    """Mean cross-entropy and `weight` times the coherence of gradients; half of the images get `noise`."""

    weight: NonNegative = 0.5
    noise: NonNegative = 0.045
    weight_decay: NonNegative = 1e-4

    ensembles = True
    min_members = 2

    def default_size(self, samples: int) -> Size:
        """Return the size in the DVERGE paper's comparison; a shorter run on a small set."""
        return ensemble_utils.adam_size(samples)

    def optimizer(self, parameters: Iterable[nn.Parameter], plan: Plan) -> torch.optim.Optimizer:
        """Return Adam."""
        return ensemble_utils.adam(parameters, plan.lr, self.weight_decay)

    def rate(self, step: int, plan: Plan) -> float:
        """Return `lr`, a tenth of it from a half and a hundredth from three quarters of the run."""
        return ensemble_utils.step_decay(step, plan.steps, plan.lr)

    def backward(self, nets: Sequence[nn.Module], batch: Batch, plan: Plan) -> Tensor:
        """Add the gradient of the sum, with second derivatives."""
        size = batch.x[0].numel()
        draws = batch.rng.normal(size + 2)
        noisy = (draws[:, size] > 0).view(-1, 1, 1, 1)
        x = batch.x + self.noise * noisy * draws[:, :size].view_as(batch.x)
        losses, slopes = ensemble_utils.losses_and_gradients(nets, x, batch.y)
        loss = losses.mean() + self.weight * coherence(slopes)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()


def coherence(slopes: Tensor) -> Tensor:
    """Return the batch mean of the log-sum-exp of the cosines of all pairs of members' gradients (n B D)."""
    return ensemble_utils.pairwise_cosines(slopes).logsumexp(0).mean()
