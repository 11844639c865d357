"""Stochastic mini-batches of members, reweighed (Tang et al., CVPR 2024): one member a step.

The paper is "Ensemble diversity facilitates adversarial transferability".

The order of the members is the same for all images; each image has its own weights, while the authors' code has
one set for all images of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
from robustkit.registry.ranges import Count, NonNegative, Share

TINY = 1e-12


@technique("smer", paper="CVPR 2024 (Tang et al.)")
@dataclass(frozen=True, slots=True)
class SMER(Technique):
    """Returns the momentum of an inner loop that uses each of n members once in each of `rounds` rounds.

    A step is `step_size`; `momentum` is the share of the sum that each keeps. A member's logits are multiplied by
    its weight, which begins at 1 and changes after every step to raise the logarithm of the weighted ensemble's
    loss, at the learning rate `rate` with `decay`. Costs `rounds` gradients and rounds * n forward passes of n
    members. Gradients of single members are unchanged.
    """

    rounds: Count = 4
    step_size: StepSize = StepSize(0.1)
    momentum: Share = 1.0
    rate: NonNegative = 0.02
    decay: NonNegative = 0.002

    @property
    def cost(self) -> int:
        """The cost in gradients: every member once a round."""
        return self.rounds

    def wrap(self, inner: Oracle) -> Oracle:
        """Return an oracle that runs the inner loop."""
        return _Stochastic(inner, self)


class _Stochastic(OracleWrapper):
    def __init__(self, inner: Oracle, technique: SMER) -> None:
        super().__init__(inner)
        self.technique = technique
        self.weights: Tensor | None = None

    def gradient(
        self, rows: Rows, x: Images, members: Sequence[int] | None = None, weights: Weights = None
    ) -> Images:
        if members is not None or weights is not None:
            return self.inner.gradient(rows, x, members, weights)
        settings, threat, count = self.technique, rows.threat, len(self.surrogates)
        weight = (
            torch.ones(count, len(x), dtype=x.dtype, device=x.device) if self.weights is None else self.weights
        )
        order = shared_rng(rows, "smer").uniform(settings.rounds, count)[0].argsort(1).flatten().tolist()
        point, velocity, size = x, torch.zeros_like(x), settings.step_size.length(float(threat.eps))
        for number, member in enumerate(order):
            member_rows = split_rng(rows, "smer", number)
            gradient = self.inner.gradient(member_rows, point, [member], weight[member : member + 1])
            if settings.rate:
                weight = self._reweighed(rows, point, weight)
            velocity = settings.momentum * velocity + mean_normalised(gradient)
            point = rows.project(point + size * threat.ascent(velocity))
        self.weights = weight
        return velocity

    def _reweighed(self, rows: Rows, x: Images, weight: Tensor) -> Tensor:
        logits = self.surrogates.logits(x)
        with torch.enable_grad():
            variable = weight.detach().requires_grad_()
            loss = rows.aim.loss((variable[:, :, None] * logits).mean(0), "ce")
            (slope,) = torch.autograd.grad(loss.sum(), variable)
        slope = slope / loss.detach().abs().clamp(min=TINY)
        settings = self.technique
        return (weight + settings.rate * (slope - settings.decay * weight)).clamp(min=TINY)
