"""T-DEE: how many independently trained nets would transfer as well (Gubri et al., UAI 2022, arXiv:2011.05074)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000


@dataclass(frozen=True)
class Equivalent:
    """A number of nets with its 95 % interval; infinite above the success of the most that were tried, `most`."""

    value: float
    low: float
    high: float
    most: int

    def __str__(self) -> str:
        def text(number: float) -> str:
            return f">{self.most}" if number == float("inf") else f"{number:.1f}"

        return f"{text(self.value)} ({text(self.low)} – {text(self.high)})"


def deep_ensemble_equivalent(
    nets: Mapping[int, Sequence[bool | None]], found: Sequence[bool | None], *, level: float = 0.95, seed: int = 0
) -> Equivalent:
    """Return how many nets have the success of what is compared, by interpolation.

    Success rises from 0 with no net in straight lines between the counts that were tried; where it falls with more
    nets, sampling noise did that, and the line stays level. The interval is that of the images, drawn again with
    replacement for all attacks alike (a paired bootstrap).

    Args:
        nets: by the number of nets, of each image whether it fooled the target; None where the target was wrong.
        found: the same of what is compared.
        level: of the interval.
        seed: of the draws.
    """
    counts = sorted(nets)
    rows = [nets[count] for count in counts] + [list(found)]
    right = [place for place, hit in enumerate(rows[0]) if hit is not None]
    if not right or any(len(row) != len(rows[0]) for row in rows):
        raise ValueError("T-DEE compares attacks on the same images, at least one of which the target gets right.")
    hits = np.array([[bool(row[place]) for place in right] for row in rows], dtype=float)
    shares = np.random.default_rng(seed).multinomial(len(right), [1 / len(right)] * len(right), size=DRAWS)
    drawn = shares @ hits.T / len(right)
    values = [_interpolated(counts, row[:-1], row[-1]) for row in (hits.mean(1), *drawn)]
    tail = (1 - level) / 2
    # No mean of neighbours: one of them may be infinite.
    low, high = (float(np.quantile(values[1:], quantile, method="nearest")) for quantile in (tail, 1 - tail))
    return Equivalent(values[0], low, high, counts[-1])


def _interpolated(counts: Sequence[int], success: np.ndarray, found: float) -> float:
    heights = np.maximum.accumulate(np.concatenate([[0.0], success]))
    if found > heights[-1]:
        return float("inf")
    # The fewest nets that reach it: on a level piece its beginning.
    place = int(np.searchsorted(heights, found))
    if place == 0:
        return 0.0
    below, above = heights[place - 1], heights[place]
    numbers = [0, *counts]
    return float(numbers[place - 1] + (found - below) / (above - below) * (numbers[place] - numbers[place - 1]))
