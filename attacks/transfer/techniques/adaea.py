"""Adaptive ensemble attack (Chen et al. 2023, arXiv:2308.02897): members weighed by how they transfer.

Each image has its own weights, while the authors' are those of the batch; the filter uses all pairs of members,
while their code leaves out the last member's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from robustkit.attack_api import Oracle, OracleWrapper, Rows, Technique, Weights, split_rng
from robustkit.core.limits import Limits
from robustkit.core.shapes import Images
from robustkit.core.step_size import StepSize
from robustkit.registry import technique
from robustkit.registry.ranges import NonNegative

TINY = 1e-6
MAX_RATIO = 10.0


@technique("adaea", paper="arXiv:2308.02897")
@dataclass(frozen=True, slots=True)
class AdaEA(Technique):
    """Weights members by the loss that a step along their gradient causes in the others.

    The weights are a softmax of `beta` times the sum of those losses, each divided by the loss of the other's own
    step; a step is `step_size`. Pixels where the members' gradients have a mean cosine below `threshold` are left
    out. Costs 2 gradients and n * n forward passes of n members. Gradients of single members are unchanged.
    """

    beta: NonNegative = 10.0
    threshold: Annotated[float, Limits(-1, 1)] = -0.3
    step_size: StepSize = StepSize(0.1)

    @property
    def cost(self) -> int:
        """The cost in gradients: one of the members, one of the weighted ensemble."""
        return 2

    def wrap(self, inner: Oracle) -> Oracle:
        """Return an oracle that weights the members."""
        return _Adaptive(inner, self)


class _Adaptive(OracleWrapper):
    def __init__(self, inner: Oracle, technique: AdaEA) -> None:
        super().__init__(inner)
        self.technique = technique

    def gradient(
        self, rows: Rows, x: Images, members: Sequence[int] | None = None, weights: Weights = None
    ) -> Images:
        count = len(self.surrogates)
        if members is not None or weights is not None or count == 1:
            return self.inner.gradient(rows, x, members, weights)
        own = [self.inner.gradient(split_rng(rows, "adaea", member), x, [member]) for member in range(count)]
        gradient = self.inner.gradient(rows, x, None, self._weights(rows, x, own))
        return gradient * (agreement(torch.stack(own)) >= self.technique.threshold)[:, None]

    def _weights(self, rows: Rows, x: Images, own: Sequence[Images]) -> Tensor:
        """Return the weights of the members, (n B), which sum to 1."""
        threat, size = rows.threat, self.technique.step_size.length(float(rows.threat.eps))
        losses = []
        for gradient in own:
            moved = rows.project(x + size * threat.ascent(gradient))
            losses.append(torch.stack([rows.aim.loss(logits, "ce") for logits in self.surrogates.logits(moved)]))
        caused = torch.stack(losses).abs() + TINY
        alone = caused.diagonal().T[None]
        # In a targeted attack a loss nearer to zero is better.
        ratio = (caused / alone if rows.aim.targets is None else alone / caused).clamp(max=MAX_RATIO)
        others = 1 - torch.eye(len(own), dtype=ratio.dtype, device=ratio.device)[:, :, None]
        return (self.technique.beta * (others * ratio).sum(1)).softmax(0)


def agreement(gradients: Tensor) -> Tensor:
    """Return the mean cosine of the colours of different members' gradients (n B C H W) at each pixel, (B H W)."""
    unit = F.normalize(gradients, dim=2, eps=torch.finfo(gradients.dtype).tiny)
    count = len(unit)
    # The cosines of all pairs, each with itself among them, are the squared length of the sum.
    pairs = unit.sum(0).square().sum(1) - unit.square().sum((0, 2))
    return pairs / (count * (count - 1))
