"""The minimum norms of a run: distances, their quantiles, the median with its interval. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from robustkit.core.intervals import median_ranks
from robustkit.core.schema import Amount

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Middle:
    """A median with its 95 % interval; None for an infinite end, or if there are too few numbers."""

    value: Amount | None
    low: Amount | None
    high: Amount | None

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Middle:
        """Return the median of sorted numbers, and its interval between two of them (`intervals.median_ranks`)."""
        low, high = median_ranks(len(numbers))
        ends = [numbers[rank] if 0 <= rank < len(numbers) else None for rank in (low, high)]
        return cls(
            quantile(numbers, 0.5), *(end if end is not None and math.isfinite(end) else None for end in ends)
        )


@dataclass(frozen=True)
class Minimum:
    """The distance of each image's nearest adversarial image, as found by a run under a threat such as `l2:min`.

    `distances` has one entry per verdict: 0 if the clean image is misclassified, None if no adversarial image was
    found. `quantiles` are those of the correctly classified images, by their share; None if that quantile is
    infinite. `median` has a 95 % interval by order statistics, which needs no assumption on the distribution.
    """

    distances: Sequence[Amount | None]
    quantiles: Mapping[str, Amount | None]
    median: Middle

    @classmethod
    def of(cls, distances: Sequence[float | None]) -> Minimum:
        """Return the record of these distances."""
        right = sorted(math.inf if distance is None else distance for distance in distances if distance != 0)
        return cls(distances, {str(share): quantile(right, share) for share in QUANTILES}, Middle.of(right))

    @property
    def right(self) -> list[float]:
        """The distances of the correctly classified images, sorted; infinite if no adversarial was found."""
        return sorted(math.inf if distance is None else distance for distance in self.distances if distance != 0)

    def curve(self) -> Iterator[tuple[float, float]]:
        """Yield each distance, sorted, with the robust accuracy at that eps: the share of larger distances."""
        n = len(self.distances)
        for distance in sorted(math.inf if distance is None else distance for distance in self.distances):
            if math.isfinite(distance):
                n -= 1
                yield distance, n / len(self.distances)


def quantile(numbers: Sequence[float], share: float) -> float | None:
    """Return a quantile of sorted numbers, interpolated linearly; None if it is infinite or there are none."""
    if not numbers:
        return None
    rank = share * (len(numbers) - 1)
    below, above = numbers[math.floor(rank)], numbers[math.ceil(rank)]
    value = below if below == above else below + (rank - math.floor(rank)) * (above - below)
    return value if math.isfinite(value) else None
