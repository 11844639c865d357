"""MART (Wang et al., ICLR 2020): adversarial training that emphasises images which the net classifies poorly.

Batch norms use their running statistics while images are attacked, as in the authors' code. With an ensemble, each
member is trained on adversarial images of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.core.shapes import Labels, Logits
from robustkit.core.step_size import StepSize
from robustkit.defenses.adversarial_training.base import PerturbedTraining
from robustkit.registry import method
from robustkit.registry.ranges import Count, NonNegative, ShareBelowOne
from robustkit.training import ensemble_utils
from robustkit.training.method import Batch, Plan


@method("mart", paper="ICLR 2020")
@dataclass(frozen=True, slots=True)
class MART(PerturbedTraining):
    """Boosted cross-entropy on adversarial images, and `beta` times a divergence weighted by 1 - p(label | image).

    PGD starts from normal noise of standard deviation `start`. A step has the length `step_size`: `0.25eps`, or
    `2/255px` in pixel units.
    """

    beta: NonNegative = 5.0
    threat: str = "linf:8/255"
    steps: Count = 10
    step_size: StepSize = StepSize(0.25)
    start: NonNegative = 0.001
    momentum: ShareBelowOne = 0.9
    weight_decay: NonNegative = 2e-4

    epochs = 120

    def rate(self, step: int, plan: Plan) -> float:
        """Return `lr`, a tenth of it from epoch 75 of 120 and a hundredth from epoch 100, as the paper does."""
        done = step / plan.steps
        return float(plan.lr * 0.1 ** ((done >= 75 / 120) + (done >= 100 / 120)))

    def loss(self, net: nn.Module, batch: Batch, plan: Plan) -> Tensor:
        """Return the weighted loss on adversarial images."""
        with ensemble_utils.batch_norm_policy([net], "frozen"):
            attacked = self.perturbed(
                lambda x: F.cross_entropy(net(x), batch.y, reduction="none"),
                self.noisy_images(batch, self.start),
                batch,
            )
        return boosted(net(batch.x), net(attacked), batch.y, self.beta).mean()


def boosted(clean: Logits, attacked: Logits, labels: Labels, beta: float) -> Tensor:
    """Return MART's loss (B) of logits (B K) at images x and at their adversarial images x'.

    It is -log p(y | x') - log(1 - max over k != y of p(k | x')) + beta KL(p(x) || p(x')) (1 - p(y | x)).
    """
    near, far = clean.log_softmax(1), attacked.log_softmax(1)
    others = far.masked_fill(F.one_hot(labels, far.shape[1]).bool(), -torch.inf).amax(1)
    # In float32 p can round to 1, where log(1 - p) is infinite.
    margin = -torch.log1p(-others.exp().clamp(max=1 - 1e-6))
    weight = 1 - near.gather(1, labels[:, None])[:, 0].exp()
    apart = (near.exp() * (near - far)).sum(1)
    return F.nll_loss(far, labels, reduction="none") + margin + beta * weight * apart
