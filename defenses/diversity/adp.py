"""Adaptive diversity promoting (Pang et al. 2019, arXiv:1901.08846): diverse probabilities of the wrong classes.

Logarithms are computed from log-probabilities; the authors' code adds 1e-20 to probabilities. The paper's
combination with adversarial training is not included.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.core.errors import UsageError
from robustkit.core.shapes import Labels
from robustkit.registry import method
from robustkit.registry.ranges import NonNegative
from robustkit.training import ensemble_utils
from robustkit.training.method import Batch, Method, Plan, Size

# Added to the diagonal of the Gram matrix, so that its determinant is positive.
JITTER = 1e-6


@method("adp", paper="arXiv:1901.08846")
@dataclass(frozen=True, slots=True)
class ADP(Method):
    """Cross-entropy minus `entropy` times the ensemble's entropy and `volume` times the members' log volume."""

    entropy: NonNegative = 2.0
    volume: NonNegative = 0.5
    weight_decay: NonNegative = 1e-4

    ensembles = True
    min_members = 2

    def default_size(self, samples: int) -> Size:
        """Return the size in the DVERGE paper's comparison; a shorter run on a small set."""
        return ensemble_utils.adam_size(samples)

    def check_plan(self, plan: Plan) -> None:
        """Refuse as many members as classes: the volume spanned in fewer dimensions is 0."""
        Method.check_plan(self, plan)
        if plan.members >= plan.classes:
            raise UsageError(
                f"adp: --members {plan.members} are more than the {plan.classes - 1} wrong classes in which "
                "they can differ; use fewer."
            )

    def optimizer(self, parameters: Iterable[nn.Parameter], plan: Plan) -> torch.optim.Optimizer:
        """Return Adam."""
        return ensemble_utils.adam(parameters, plan.lr, self.weight_decay)

    def rate(self, step: int, plan: Plan) -> float:
        """Return `lr`, a tenth of it from a half and a hundredth from three quarters of the run."""
        return ensemble_utils.step_decay(step, plan.steps, plan.lr)

    def backward(self, nets: Sequence[nn.Module], batch: Batch, plan: Plan) -> Tensor:
        """Add the gradient of the sum."""
        logits = torch.stack([net(batch.x) for net in nets])
        loss = torch.stack([F.cross_entropy(one, batch.y) for one in logits]).sum()
        loss = loss - self.entropy * entropy(logits) - self.volume * volume(logits, batch.y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach() / len(nets)


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy of the mean probabilities of members' logits (n B K), averaged over the batch."""
    mean = ensemble_utils.ensemble_log_probabilities(logits)
    return -(mean.exp() * mean).sum(1).mean()


def volume(logits: Tensor, labels: Labels) -> Tensor:
    """Return the mean log squared volume that the members' normalised wrong-class probabilities span."""
    right = F.one_hot(labels, logits.shape[2]).bool()
    wrong = logits.float().masked_fill(right, -torch.inf).softmax(2)  # normalisation below cancels the sum
    unit = F.normalize(wrong, dim=2).transpose(0, 1)
    gram = unit @ unit.transpose(1, 2)
    return torch.logdet(gram + JITTER * torch.eye(len(logits), device=gram.device)).mean()
