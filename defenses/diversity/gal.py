"""Gradient alignment loss (Kariyappa & Qureshi 2019, arXiv:1901.09981): members' input gradients turned apart.

The paper also trains nets with leaky ReLUs, which are the architecture's here (`--arch`), and adds noise to half
of the batches, to half of the images here.
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
    """Mean cross-entropy and `weight` times the coherence of gradients, on images of which half have `noise`."""

    weight: NonNegative = 0.5
    noise: NonNegative = 0.045
    weight_decay: NonNegative = 1e-4

    ensembles = True
    min_members = 2

    def default_size(self, samples: int) -> Size:
        """Return the size of DVERGE's comparison; less on a small set."""
        return ensemble_utils.adam_size(samples)

    def optimizer(self, parameters: Iterable[nn.Parameter], plan: Plan) -> torch.optim.Optimizer:
        """Return Adam."""
        return ensemble_utils.adam(parameters, plan.lr, self.weight_decay)

    def rate(self, step: int, plan: Plan) -> float:
        """Return `lr`, a tenth of it from a half and a hundredth from three quarters of the run."""
        return ensemble_utils.step_decay(step, plan.steps, plan.lr)

    def backward(self, nets: Sequence[nn.Module], batch: Batch, plan: Plan) -> Tensor:
        """Add the gradient of the sum, through gradients."""
        size = batch.x[0].numel()
        draws = batch.rng.normal(size + 2)
        noisy = (draws[:, size] > 0).view(-1, 1, 1, 1)
        x = batch.x + self.noise * noisy * draws[:, :size].view_as(batch.x)
        losses, slopes = ensemble_utils.losses_and_gradients(nets, x, batch.y)
        loss = losses.mean() + self.weight * coherence(slopes)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()


def coherence(slopes: Tensor) -> Tensor:
    """Return the mean of log sum exp of the cosines of all pairs of members' gradients (n B D)."""
    return ensemble_utils.pairwise_cosines(slopes).logsumexp(0).mean()
