"""Certified training by interval bound propagation (Gowal et al. 2018, arXiv:1810.12715), for small nets.

Deviations from the authors' code: the last layer is bounded by itself, while theirs is merged with the
differences of the compared logits; a batch norm uses the statistics of the centres of the intervals.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.core.errors import UsageError
from robustkit.core.shapes import Images
from robustkit.core.threat import ThreatModel
from robustkit.defenses.adversarial_training.base import RobustTraining
from robustkit.defenses.adversarial_training.interval_bounds import bounds
from robustkit.registry import method
from robustkit.registry.ranges import NonNegative, Share
from robustkit.training import ensemble_utils
from robustkit.training.method import Batch, Plan, Size


@method("ibp", paper="arXiv:1810.12715")
@dataclass(frozen=True, slots=True)
class IBP(RobustTraining):
    """Cross-entropy, mixed with that of the worst logits within the interval bounds.

    Training is plain for the share `warmup` of the run. During the following share `ramp`, eps grows from 0 to
    that of `threat`, and the weight of the worst logits' loss grows from 0 to `certified`.
    """

    threat: str = "linf:8/255"
    warmup: Share = 0.05
    ramp: Share = 0.4
    certified: Share = 0.5
    weight_decay: NonNegative = 0.0

    def __post_init__(self) -> None:
        """Refuse a threat that is not linf."""
        if ThreatModel.parse(self.threat).bounded().norm != "linf":
            raise UsageError(f"ibp: threat={self.threat} must have the norm linf, e.g. linf:8/255.")

    def default_size(self, samples: int) -> Size:
        """Return the paper's size on MNIST; a shorter run on a small set."""
        return Size(epochs=100, batch_size=100, lr=1e-3) if samples > 5000 else Size(60, 64, 2e-3)

    def check_plan(self, plan: Plan) -> None:
        """Refuse a warm-up and ramp that are longer than the run."""
        RobustTraining.check_plan(self, plan)
        if self.warmup + self.ramp > 1:
            raise UsageError(f"ibp: warmup + ramp must be at most 1, got {self.warmup + self.ramp:g}.")

    def check_nets(self, nets: Sequence[nn.Module], image: Images) -> None:
        """Refuse nets with operations that have no interval bounds."""
        for net in nets:
            with torch.no_grad():
                bounds(net, image, 0.0)

    def optimizer(self, parameters: Iterable[nn.Parameter], plan: Plan) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(parameters, lr=plan.lr, weight_decay=self.weight_decay)

    def loss(self, net: nn.Module, batch: Batch, plan: Plan) -> Tensor:
        """Return the mixture of the cross-entropy and that of the worst logits."""
        grown = min(1.0, max(0.0, (batch.step / plan.steps - self.warmup) / max(self.ramp, 1e-9)))
        plain = F.cross_entropy(net(batch.x), batch.y)
        if not grown:
            return plain
        with ensemble_utils.batch_norm_policy([net], "separate"):
            lower, upper = bounds(net, batch.x, grown * float(ThreatModel.parse(self.threat).eps))
        own = F.one_hot(batch.y, lower.shape[1]).bool()
        worst = F.cross_entropy(torch.where(own, lower, upper), batch.y)
        part = grown * self.certified
        return (1 - part) * plain + part * worst
