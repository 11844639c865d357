"""Reverse adversarial perturbation (Qin et al. 2022, arXiv:2210.05968): gradients at the worst nearby point.

The paper ascends a logit and takes 400 steps; here the attack sets the loss and the steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from robustkit.attack_api import Oracle, OracleWrapper, Rows, Technique, Weights, random_neighbour, split_rng
from robustkit.core.shapes import Images
from robustkit.core.step_size import StepSize
from robustkit.core.threat import per_row
from robustkit.registry import technique
from robustkit.registry.ranges import Count, NonNegative, Share


@technique("rap", paper="arXiv:2210.05968")
@dataclass(frozen=True, slots=True)
class RAP(Technique):
    """Takes `steps` steps downhill before each gradient; costs steps + 1 gradients.

    The descent begins at a random point and stays within `radius` times eps; a step is `step_size`. The first
    steps of the attack, the share `late`, are taken without it (the paper: 100 of 400).
    """

    steps: Count = 8
    step_size: StepSize = StepSize(0.125)
    radius: NonNegative = 1.0
    late: Share = 0.25

    @property
    def cost(self) -> int:
        """The cost in gradients: the descent and the gradient at its end."""
        return self.steps + 1

    def wrap(self, inner: Oracle) -> Oracle:
        """Return an oracle that takes the gradient where the attack is weakest nearby."""
        return _Reverse(inner, self)


class _Reverse(OracleWrapper):
    def __init__(self, inner: Oracle, technique: RAP) -> None:
        super().__init__(inner)
        self.technique = technique

    def gradient(
        self, rows: Rows, x: Images, members: Sequence[int] | None = None, weights: Weights = None
    ) -> Images:
        settings, threat = self.technique, rows.threat
        if torch.as_tensor(rows.rng.step).max() <= settings.late * self.steps:
            return self.inner.gradient(rows, x, members, weights)
        shift = self._within(rows, random_neighbour(split_rng(rows, "rap-start"), x, settings.radius) - x)
        for number in range(settings.steps):
            here = split_rng(rows, "rap", number)
            gradient = self.inner.gradient(here, (x + shift).clamp(0, 1), members, weights)
            shift = self._within(
                rows, shift - settings.step_size.length(float(threat.eps)) * threat.ascent(gradient)
            )
        return self.inner.gradient(rows, (x + shift).clamp(0, 1), members, weights)

    def _within(self, rows: Rows, shift: Images) -> Images:
        radius = self.technique.radius * float(rows.threat.eps)
        if rows.threat.norm == "linf":
            return shift.clamp(-radius, radius)
        length = rows.threat.distance(shift, torch.zeros_like(shift)).clamp(min=1e-300)
        return shift * per_row((radius / length).clamp(max=1).to(shift), shift)
