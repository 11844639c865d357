"""Stochastic variance reduced ensemble (Xiong et al. 2022, arXiv:2111.10752): an inner loop over members.

The order of the members is the same for all images, so that one forward pass is enough for them. The members'
gradients at the outer point are taken once; the authors' code takes them again in every inner step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from robustkit.attack_api import (
    Oracle,
    OracleWrapper,
    Rows,
    Technique,
    Weights,
    mean_normalised,
    shared_rng,
    split_rng,
)
from robustkit.core.shapes import Images
from robustkit.core.step_size import StepSize
from robustkit.registry import technique
from robustkit.registry.ranges import Count, Share


@technique("svre", paper="arXiv:2111.10752")
@dataclass(frozen=True, slots=True)
class SVRE(Technique):
    """Returns the momentum of `rounds` times n inner steps with a random one of n members each.

    A step is `step_size` along the member's gradient, less its own and plus the ensemble's at the outer
    point; `momentum` is the share of the sum that each step keeps. Costs rounds + 2 gradients, those of the
    members included. Gradients of single members are unchanged.
    """

    rounds: Count = 4
    step_size: StepSize = StepSize(0.1)
    momentum: Share = 1.0

    @property
    def cost(self) -> int:
        """The cost in gradients: the ensemble, its members, and the inner loop."""
        return self.rounds + 2

    def wrap(self, inner: Oracle) -> Oracle:
        """Return an oracle that runs the inner loop."""
        return _Reduced(inner, self)


class _Reduced(OracleWrapper):
    def __init__(self, inner: Oracle, technique: SVRE) -> None:
        super().__init__(inner)
        self.technique = technique

    def gradient(
        self, rows: Rows, x: Images, members: Sequence[int] | None = None, weights: Weights = None
    ) -> Images:
        settings, threat, count = self.technique, rows.threat, len(self.surrogates)
        whole = self.inner.gradient(rows, x, members, weights)
        steps = 0 if members is not None or weights is not None else settings.rounds * count
        if not steps:
            return whole
        own: dict[int, Images] = {}
        point, velocity, size = x, torch.zeros_like(x), settings.step_size.length(float(threat.eps))
        for number, member in enumerate(shared_rng(rows, "svre").integers(count, steps)[0].tolist()):
            if member not in own:
                own[member] = self.inner.gradient(rows, x, [member])
            gradient = self.inner.gradient(split_rng(rows, "svre", number), point, [member])
            velocity = settings.momentum * velocity + mean_normalised(gradient - own[member] + whole)
            point = rows.project(point + size * threat.ascent(velocity))
        return velocity
