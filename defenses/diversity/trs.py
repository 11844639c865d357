"""Transferability reduced smooth ensembles (Yang et al. 2021, arXiv:2104.00671): dissimilar, small gradients.

The gradient norm is penalised at the images of the first half of a batch, and for the second half at the end of an
ascent of the gradient norm. The constants are those of the authors' code, as is the penalty: twice the squared
norm, where the paper has the norm. Gradients are those of the batch's mean loss, as in the code. The code adds
up the gradients of all steps of the ascent, and has three members.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from robustkit.core.shapes import Images
from robustkit.core.threat import Linf
from robustkit.registry import method
from robustkit.registry.ranges import Count, NonNegative, Share
from robustkit.training import ensemble_utils
from robustkit.training.method import Batch, Method, Plan, Size


@method("trs", paper="arXiv:2104.00671")
@dataclass(frozen=True, slots=True)
class TRS(Method):
    """Cross-entropy and `scale` * (`similarity` * mean |cosine| + `smoothness` * 2 * mean squared norm).

    Cosines and norms are those of the members' input gradients.

    The linf radius of the ascent grows from `eps_start` to `eps_end` during the run; each of its `steps` has a
    third of the radius.
    """

    scale: NonNegative = 5.0
    similarity: NonNegative = 2.0
    smoothness: NonNegative = 2.0
    eps_start: Share = 0.1
    eps_end: Share = 0.2
    steps: Count = 6
    weight_decay: NonNegative = 1e-4

    ensembles = True
    min_members = 2

    def default_size(self, samples: int) -> Size:
        """Return the authors' size on CIFAR-10; a shorter run on a small set. A step has eight double passes."""
        return ensemble_utils.adam_size(samples, 120) if samples > 5000 else Size(10, 32, 0.01, members=3)

    def optimizer(self, parameters: Iterable[nn.Parameter], plan: Plan) -> torch.optim.Optimizer:
        """Return Adam."""
        return ensemble_utils.adam(parameters, plan.lr, self.weight_decay)

    def rate(self, step: int, plan: Plan) -> float:
        """Return `lr`, a tenth of it after each third of the run."""
        return float(plan.lr * 0.1 ** (3 * step // plan.steps))

    def backward(self, nets: Sequence[nn.Module], batch: Batch, plan: Plan) -> Tensor:
        """Add the gradient of the sum, with second derivatives."""
        losses, slopes = ensemble_utils.losses_and_gradients(nets, batch.x, batch.y)
        _, steep = ensemble_utils.losses_and_gradients(nets, self._steepest(nets, batch, plan), batch.y)
        similarity = ensemble_utils.pairwise_cosines(slopes).abs().mean()
        # Gradients are those of a mean over images, which are fewer in a part of the batch.
        length = _squares(steep).mean() / batch.process_group.parts**2
        loss = losses.sum() + self.scale * (self.similarity * similarity + self.smoothness * 2 * length)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach() / len(nets)

    def _steepest(self, nets: Sequence[nn.Module], batch: Batch, plan: Plan) -> Images:
        process_group = batch.process_group
        # The number of these images in the first half of the whole batch.
        half = len(range(process_group.part, len(batch.x) * process_group.parts // 2, process_group.parts))
        epoch = batch.step // plan.steps_per_epoch
        eps = self.eps_start + (self.eps_end - self.eps_start) * epoch / plan.epochs
        threat = Linf(Fraction(eps))
        x, y = batch.x[half:], batch.y[half:]

        def size(images: Images) -> Tensor:
            return _squares(ensemble_utils.losses_and_gradients(nets, images, y)[1]).mean(0)

        start = ensemble_utils.random_start(x, threat, batch.rng.select(torch.arange(half, len(batch.x))))
        return torch.cat(
            [batch.x[:half], ensemble_utils.ascend(size, start, x, threat, steps=self.steps, step_size=1 / 3)]
        )


def _squares(slopes: Tensor) -> Tensor:
    """Return the squared norms (n B) of gradients (n B D)."""
    return slopes.square().sum(2)
