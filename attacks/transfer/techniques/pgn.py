"""Penalised gradient norm (Ge et al. 2023, arXiv:2306.05225): flat maxima, by gradients at neighbours.

As in the authors' code the step from a neighbour is along its gradient scaled to a mean size of 1 a pixel; in the
paper's formula, with a sum of 1, the step would be negligible.
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
    per_pixel,
    random_neighbour,
    split_rng,
)
from robustkit.core.shapes import Images
from robustkit.core.step_size import StepSize
from robustkit.registry import technique
from robustkit.registry.ranges import Count, NonNegative, Share


@technique("pgn", paper="arXiv:2306.05225")
@dataclass(frozen=True, slots=True)
class PGN(Technique):
    """Averages gradients at `copies` neighbours and one step downhill of them; costs 2 * copies gradients.

    Neighbours are drawn uniformly within `radius` times eps; the step is `step_size`, and the gradient after it
    has the weight `balance`.
    """

    copies: Count = 20
    radius: NonNegative = 3.0
    step_size: StepSize = StepSize(0.1)
    balance: Share = 0.5

    @property
    def cost(self) -> int:
        """The cost in gradients: two a neighbour."""
        return 2 * self.copies

    def wrap(self, inner: Oracle) -> Oracle:
        """Return an oracle that takes gradients around a point."""
        return _Flat(inner, self)


class _Flat(OracleWrapper):
    def __init__(self, inner: Oracle, technique: PGN) -> None:
        super().__init__(inner)
        self.technique = technique

    def gradient(
        self, rows: Rows, x: Images, members: Sequence[int] | None = None, weights: Weights = None
    ) -> Images:
        settings, total = self.technique, torch.zeros_like(x)
        step = settings.step_size.length(per_pixel(rows.threat, x))
        for number in range(settings.copies):
            here, there = split_rng(rows, "pgn", 2 * number), split_rng(rows, "pgn", 2 * number + 1)
            near = random_neighbour(here, x, settings.radius)
            first = self.inner.gradient(here, near, members, weights)
            second = self.inner.gradient(there, near - step * mean_normalised(first), members, weights)
            total = total + (1 - settings.balance) * first + settings.balance * second
        return total / settings.copies
