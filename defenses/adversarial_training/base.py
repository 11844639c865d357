"""What methods of adversarial training share: SGD with momentum, a threat, and a mean of the members' losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from robustkit.core.shapes import Images
from robustkit.core.step_size import StepSize
from robustkit.core.threat import ThreatModel
from robustkit.registry.ranges import Count, NonNegative, ShareBelowOne
from robustkit.training import ensemble_utils
from robustkit.training.method import Batch, Method, Plan, Size


class RobustTraining(Method):
    """Base of methods that train each member, or all members together, on a loss of their own.

    A subclass declares the fields and defines `loss`, or `losses` if the loss of a member depends on the others.
    """

    __slots__ = ()

    ensembles = True
    # Epochs of the paper on CIFAR-10.
    epochs: ClassVar[int] = 100

    def default_size(self, samples: int) -> Size:
        """Return the paper's size on CIFAR-10; a shorter run on a small set."""
        return ensemble_utils.sgd_size(samples, self.epochs)

    def supports_member_parallel(self) -> bool:
        """Return whether each member has a loss of its own."""
        return type(self).losses is RobustTraining.losses

    def rate(self, step: int, plan: Plan) -> float:
        """Return `lr`, a tenth of it from a half and a hundredth from three quarters of the run."""
        return ensemble_utils.step_decay(step, plan.steps, plan.lr)

    def backward(self, nets: Sequence[nn.Module], batch: Batch, plan: Plan) -> Tensor:
        """Add the gradient of the sum of the members' losses."""
        total = torch.stack(self.losses(nets, batch, plan)).sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total.detach() / len(nets)

    def losses(self, nets: Sequence[nn.Module], batch: Batch, plan: Plan) -> list[Tensor]:
        """Return the mean loss over the batch of each member."""
        return [self.loss(net, batch, plan) for net in nets]

    def loss(self, net: nn.Module, batch: Batch, plan: Plan) -> Tensor:
        """Return the mean loss of one member over the batch."""
        raise TypeError(f"{type(self).__name__} defines neither `loss` nor `losses`.")


class PerturbedTraining(RobustTraining):
    """Base of methods that train on images perturbed by projected gradient ascent within a threat model.

    A subclass declares these fields, with the defaults of its paper.
    """

    __slots__ = ()

    threat: str
    steps: Count
    step_size: StepSize
    momentum: ShareBelowOne
    weight_decay: NonNegative

    def __post_init__(self) -> None:
        """Refuse an unknown threat."""
        ThreatModel.parse(self.threat).bounded()

    def perturbed(self, value: Callable[[Images], Tensor], start: Images, batch: Batch) -> Images:
        """Return the images (B C H W) after `steps` projected steps up a value (B) of the images.

        Args:
            value: function of images (B C H W), for example a loss of each image.
            start: first images (B C H W), in the ball of the threat.
            batch: the batch whose images are the centres of the balls.
        """
        threat = ThreatModel.parse(self.threat)
        step_size = self.step_size.share(float(threat.eps))
        return ensemble_utils.ascend(value, start, batch.x, threat, steps=self.steps, step_size=step_size)

    def noisy_images(self, batch: Batch, deviation: float) -> Images:
        """Return the images with normal noise, projected onto the ball of the threat."""
        noise = deviation * batch.rng.normal(*batch.x.shape[1:])
        return ThreatModel.parse(self.threat).project(batch.x + noise, batch.x)
