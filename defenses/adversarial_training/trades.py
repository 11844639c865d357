"""TRADES (Zhang et al. 2019, arXiv:1901.08573): accuracy on images, and the same answer around them.

Batch norms make adversarial images with their running statistics, as in the authors' code. Of an ensemble, the
images move its mean probabilities, and every member is to answer alike around its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.core.shapes import Images
from robustkit.core.step_size import StepSize
from robustkit.core.threat import ThreatModel
from robustkit.registry import method
from robustkit.registry.ranges import Count, NonNegative, ShareBelowOne
from robustkit.training import ensemble_utils
from robustkit.training.method import Batch, Method, Plan, Size


@method("trades", paper="arXiv:1901.08573")
@dataclass(frozen=True, slots=True)
class TRADES(Method):
    """Cross-entropy and `beta` times the divergence from what is answered nearby.

    Ascent begins with normal noise of deviation `start`; a step is `step_size`: `0.25eps`, or `2/255px` in
    pixel units.
    """

    beta: NonNegative = 6.0
    threat: str = "linf:0.031"
    steps: Count = 10
    step_size: StepSize = StepSize(0.226)
    start: NonNegative = 0.001
    momentum: ShareBelowOne = 0.9
    weight_decay: NonNegative = 2e-4

    ensembles = True

    def __post_init__(self) -> None:
        """Refuse an unknown threat."""
        ThreatModel.parse(self.threat).bounded()

    def size(self, samples: int) -> Size:
        """Return the paper's size on CIFAR-10, with the whole course of rates; less on a small set."""
        return ensemble_utils.sgd_size(samples, 100)

    def rate(self, step: int, plan: Plan) -> float:
        """Return `lr`, a tenth of it from three quarters and a hundredth from nine tenths of the run."""
        done = step / plan.steps
        return float(plan.lr * 0.1 ** ((done >= 0.75) + (done >= 0.9)))

    def backward(self, nets: Sequence[nn.Module], batch: Batch, plan: Plan) -> Tensor:
        """Add the gradient of the sum."""
        with ensemble_utils.statistics(nets, "frozen"):
            nearby = self._nearby(nets, batch)
        losses = []
        for net in nets:
            clean, other = net(batch.x), net(nearby)
            apart = divergence(clean.log_softmax(1), other.log_softmax(1)).mean()
            losses.append(F.cross_entropy(clean, batch.y) + self.beta * apart)
        total = torch.stack(losses).sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total.detach() / len(nets)

    def _nearby(self, nets: Sequence[nn.Module], batch: Batch) -> Images:
        threat = ThreatModel.parse(self.threat)

        def answer(x: Images) -> Tensor:
            return ensemble_utils.mixed(torch.stack([net(x) for net in nets]))

        with torch.no_grad():
            clean = answer(batch.x)
        noise = self.start * batch.rng.normal(*batch.x.shape[1:])
        return ensemble_utils.ascend(
            lambda x: divergence(clean, answer(x)),
            threat.project(batch.x + noise, batch.x),
            batch.x,
            threat,
            steps=self.steps,
            step_size=self.step_size.share(float(threat.eps)),
        )


def divergence(one: Tensor, other: Tensor) -> Tensor:
    """Return the divergence of each row's probabilities from the other's (B), of their logarithms (B K)."""
    return (one.exp() * (one - other)).sum(1)
