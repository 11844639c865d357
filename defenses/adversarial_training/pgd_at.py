"""Adversarial training (Madry et al. 2018, arXiv:1706.06083), of one net or of an ensemble.

Batch norms make adversarial images with their running statistics, where Madry's code trains while it attacks:
`statistics` says it.
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
from robustkit.registry import method
from robustkit.registry.ranges import Count, NonNegative, ShareBelowOne
from robustkit.training import ensemble_utils
from robustkit.training.method import Batch, Method, Plan, Size


@method("pgd-at", paper="arXiv:1706.06083")
@dataclass(frozen=True, slots=True)
class PGDAT(Method):
    """Cross-entropy on PGD's images alone: of the ensemble, or, without `joint`, of each member by itself.

    A step of PGD is `step_size`: `0.25eps`, or `2/255px` in pixel units. It starts at a random point of the
    ball or, without `random_start`, at the image.
    """

    threat: str = "linf:8/255"
    steps: Count = 10
    step_size: StepSize = StepSize(0.25)
    random_start: bool = True
    joint: bool = True
    statistics: str = "frozen"
    momentum: ShareBelowOne = 0.9
    weight_decay: NonNegative = 5e-4

    ensembles = True

    def __post_init__(self) -> None:
        """Refuse an unknown word or threat."""
        if self.statistics not in ensemble_utils.STATISTICS:
            raise did_you_mean("statistics", self.statistics, ensemble_utils.STATISTICS)
        ThreatModel.parse(self.threat).bounded()

    def size(self, samples: int) -> Size:
        """Return a usual size on CIFAR-10; less on a small set."""
        return ensemble_utils.sgd_size(samples, 200)

    def divides(self) -> bool:
        """Return whether every member has images of its own."""
        return not self.joint

    def rate(self, step: int, plan: Plan) -> float:
        """Return `lr`, a tenth of it from a half and a hundredth from three quarters of the run."""
        return ensemble_utils.tenfold(step, plan.steps, plan.lr)

    def backward(self, nets: Sequence[nn.Module], batch: Batch, plan: Plan) -> Tensor:
        """Add the gradient of every member's loss on adversarial images."""
        groups = [list(nets)] if self.joint else [[net] for net in nets]
        with ensemble_utils.statistics(nets, self.statistics):
            attacked = [self._attacked(group, batch) for group in groups]
        total = torch.stack(
            [F.cross_entropy(net(x), batch.y) for group, x in zip(groups, attacked, strict=True) for net in group]
        ).sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total.detach() / len(nets)

    def _attacked(self, nets: Sequence[nn.Module], batch: Batch) -> Images:
        threat = ThreatModel.parse(self.threat)

        def loss(x: Images) -> Tensor:
            mean = ensemble_utils.mixed(torch.stack([net(x) for net in nets]))
            return F.nll_loss(mean, batch.y, reduction="none")

        start = ensemble_utils.random_start(batch.x, threat, batch.rng) if self.random_start else batch.x
        size = self.step_size.share(float(threat.eps))
        return ensemble_utils.ascend(loss, start, batch.x, threat, steps=self.steps, step_size=size)
