"""Adversarial training (Madry et al. 2018, arXiv:1706.06083), of one net or of an ensemble.

By default batch norms use their running statistics while images are attacked; in Madry's code they are in train
mode. The field `statistics` sets this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.core.errors import did_you_mean
from robustkit.core.shapes import Images
from robustkit.core.step_size import StepSize
from robustkit.core.threat import ThreatModel
from robustkit.defenses.adversarial_training.base import PerturbedTraining
from robustkit.registry import method
from robustkit.registry.ranges import Count, NonNegative, ShareBelowOne
from robustkit.training import ensemble_utils
from robustkit.training.method import Batch, Plan


@method("pgd-at", paper="arXiv:1706.06083")
@dataclass(frozen=True, slots=True)
class PGDAT(PerturbedTraining):
    """Cross-entropy on PGD's adversarial images of the ensemble or, without `joint`, of each member by itself.

    A step of PGD has the length `step_size`: `0.25eps`, or `2/255px` in pixel units. PGD starts at a random
    point of the ball or, without `random_start`, at the image.
    """

    threat: str = "linf:8/255"
    steps: Count = 10
    step_size: StepSize = StepSize(0.25)
    random_start: bool = True
    joint: bool = True
    statistics: str = "frozen"
    momentum: ShareBelowOne = 0.9
    weight_decay: NonNegative = 5e-4

    epochs = 200

    def __post_init__(self) -> None:
        """Refuse an unknown policy of batch norms, or an unknown threat."""
        if self.statistics not in ensemble_utils.BATCH_NORM_POLICIES:
            raise did_you_mean("statistics", self.statistics, ensemble_utils.BATCH_NORM_POLICIES)
        PerturbedTraining.__post_init__(self)

    def supports_member_parallel(self) -> bool:
        """Return whether every member has adversarial images of its own."""
        return not self.joint

    def losses(self, nets: Sequence[nn.Module], batch: Batch, plan: Plan) -> list[Tensor]:
        """Return each member's cross-entropy on adversarial images."""
        groups = [list(nets)] if self.joint else [[net] for net in nets]
        with ensemble_utils.batch_norm_policy(nets, self.statistics):
            attacked = [self._attacked(group, batch) for group in groups]
        return [
            F.cross_entropy(net(x), batch.y) for group, x in zip(groups, attacked, strict=True) for net in group
        ]

    def _attacked(self, nets: Sequence[nn.Module], batch: Batch) -> Images:
        threat = ThreatModel.parse(self.threat)

        def loss(x: Images) -> Tensor:
            mean = ensemble_utils.ensemble_log_probabilities(torch.stack([net(x) for net in nets]))
            return F.nll_loss(mean, batch.y, reduction="none")

        start = ensemble_utils.random_start(batch.x, threat, batch.rng) if self.random_start else batch.x
        return self.perturbed(loss, start, batch)
