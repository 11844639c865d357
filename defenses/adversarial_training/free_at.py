"""Free adversarial training (Shafahi et al. 2019, arXiv:1904.12843): one backward pass updates weights and images.

Each batch is used `repeats` times in a row, and every backward pass also gives a step of the perturbation. So
an epoch costs as much as `repeats` epochs of plain training.

Deviations from the authors' code: the perturbation starts at zero for each batch, while theirs starts from the
perturbation of the previous batch, which has other images; the learning rate changes between batches, not passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.core.step_size import StepSize
from robustkit.core.threat import ThreatModel
from robustkit.defenses.adversarial_training.base import RobustTraining
from robustkit.registry import method
from robustkit.registry.ranges import Count, NonNegative, ShareBelowOne
from robustkit.training.method import Batch, BatchNeeds, Plan, Size


@method("free-at", paper="arXiv:1904.12843")
@dataclass(frozen=True, slots=True)
class FreeAT(RobustTraining):
    """Cross-entropy on images perturbed by `step_size` (`1eps`, `8/255px`) after each of `repeats` passes."""

    threat: str = "linf:8/255"
    repeats: Count = 8
    step_size: StepSize = StepSize(1.0)
    momentum: ShareBelowOne = 0.9
    weight_decay: NonNegative = 5e-4

    def __post_init__(self) -> None:
        """Refuse an unknown threat."""
        ThreatModel.parse(self.threat).bounded()

    def default_size(self, samples: int) -> Size:
        """Return the paper's size on CIFAR-10, where an epoch costs `repeats` plain ones; less on a small set."""
        return Size(epochs=25, batch_size=128, lr=0.1) if samples > 5000 else Size(10, 64, 0.02)

    @property
    def batch_needs(self) -> BatchNeeds:
        """Return the number of passes over each batch."""
        return BatchNeeds(repeats=self.repeats)

    def backward(self, nets: Sequence[nn.Module], batch: Batch, plan: Plan) -> Tensor:
        """Add the gradient of every member's loss at its images, and perturb these for the next pass."""
        threat = ThreatModel.parse(self.threat)
        total = torch.zeros((), device=batch.x.device)
        for number, net in enumerate(nets, batch.process_group.first):
            x = batch.carried.get(str(number), batch.x).detach().requires_grad_()
            loss = F.cross_entropy(net(x), batch.y)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
            if x.grad is not None:
                moved = x.detach() + self.step_size.length(float(threat.eps)) * threat.ascent(x.grad)
                batch.carried[str(number)] = threat.project(moved, batch.x)
        return total / len(nets)
