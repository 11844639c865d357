"""Input-gradient regularisation (Ross & Doshi-Velez 2018, arXiv:1711.09404): small gradients instead of attacks.

The paper penalises the squared l2 norm of the gradient of the cross-entropy in the image, summed over a batch. We
take the mean over its images, so that `weight` does not depend on the batch size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.registry import method
from robustkit.registry.ranges import NonNegative, ShareBelowOne
from robustkit.training import ensemble_utils
from robustkit.training.method import Batch, Method, Plan, Size


@method("grad-reg", paper="arXiv:1711.09404")
@dataclass(frozen=True, slots=True)
class GradReg(Method):
    """Cross-entropy, and `weight` times the mean squared l2 norm of its gradient in the image.

    A net whose activations are piecewise linear is trained, too: its second derivatives exist between the kinks.
    """

    weight: NonNegative = 1.0
    momentum: ShareBelowOne = 0.9
    weight_decay: NonNegative = 5e-4

    ensembles = True

    def size(self, samples: int) -> Size:
        """Return a usual size on CIFAR-10; less on a small set."""
        return ensemble_utils.sgd_size(samples, 100)

    def divides(self) -> bool:
        """Return that members have nothing to do with each other."""
        return True

    def rate(self, step: int, plan: Plan) -> float:
        """Return `lr`, a tenth of it from a half and a hundredth from three quarters of the run."""
        return ensemble_utils.tenfold(step, plan.steps, plan.lr)

    def backward(self, nets: Sequence[nn.Module], batch: Batch, plan: Plan) -> Tensor:
        """Add the gradient of every member's loss."""
        total = torch.stack([self._loss(net, batch) for net in nets]).sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total.detach() / len(nets)

    def _loss(self, net: nn.Module, batch: Batch) -> Tensor:
        x = batch.x.detach().requires_grad_()
        losses = F.cross_entropy(net(x), batch.y, reduction="none")
        (slope,) = torch.autograd.grad(losses.sum(), x, create_graph=True)
        return losses.mean() + self.weight * slope.flatten(1).square().sum(1).mean()
