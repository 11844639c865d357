"""Input-gradient regularisation (Ross & Doshi-Velez 2018, arXiv:1711.09404): a penalty on input gradients.

The paper penalises the squared l2 norm of the input gradient of the cross-entropy, summed over a batch. Here it is
averaged over the images, so that `weight` does not depend on the batch size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.defenses.adversarial_training.base import RobustTraining
from robustkit.registry import method
from robustkit.registry.ranges import NonNegative, ShareBelowOne
from robustkit.training.method import Batch, Plan


@method("grad-reg", paper="arXiv:1711.09404")
@dataclass(frozen=True, slots=True)
class GradReg(RobustTraining):
    """Cross-entropy, and `weight` times the mean squared l2 norm of its input gradient.

    Nets with piecewise linear activations can be trained: their second derivatives exist almost everywhere.
    """

    weight: NonNegative = 1.0
    momentum: ShareBelowOne = 0.9
    weight_decay: NonNegative = 5e-4

    def loss(self, net: nn.Module, batch: Batch, plan: Plan) -> Tensor:
        """Return the cross-entropy with the penalty."""
        x = batch.x.detach().requires_grad_()
        losses = F.cross_entropy(net(x), batch.y, reduction="none")
        (gradient,) = torch.autograd.grad(losses.sum(), x, create_graph=True)
        return losses.mean() + self.weight * gradient.flatten(1).square().sum(1).mean()
