"""The parts of an evaluation's report: rates, costs, stages, verdicts, curve, draws, audit. Imports no torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

from robustkit.core.intervals import anytime_interval, two_phase_interval
from robustkit.core.limits import Limits
from robustkit.core.schema import Amount, Count, OneOf, Share

# Relative tolerance when a rate is compared with its hits.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Rate:
    """A share of n images with its 95 % Wilson interval."""

    value: Share
    low: Share
    high: Share
    n: Count

    def is_of(self, hits: int, n: int) -> bool:
        """Return whether it is the share of this many hits, inside its interval."""
        inside = self.low - ROUNDING <= self.value <= self.high + ROUNDING
        return inside and self.n == n and abs(self.value * n - hits) < ROUNDING * max(n, 1)

    @classmethod
    def of(cls, hits: int, n: int) -> Rate:
        """Return hits / n with the Wilson score interval; it never leaves [0, 1] and n must be positive."""
        z = 1.959963984540054
        share = hits / n
        centre = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        low = 0.0 if hits == 0 else max(0.0, centre - half)
        high = 1.0 if hits == n else min(1.0, centre + half)
        return cls(share, low, high, n)

    @classmethod
    def anytime(cls, hits: int, n: int, unknown: int = 0) -> Rate:
        """Return hits / n with an interval that is valid for any stopping rule (`intervals.anytime_interval`).

        `unknown` of the hits may turn out to be misses: the lower end counts them as such.
        """
        return cls(hits / n, anytime_interval(max(hits - unknown, 0), n)[0], anytime_interval(hits, n)[1], n)


@dataclass(frozen=True)
class Cost:
    """Forward and backward passes of images, verification included, and seconds."""

    forwards: Count
    backwards: Count
    seconds: Amount


@dataclass(frozen=True)
class Passes:
    """Forward and backward passes of images."""

    forwards: Count
    backwards: Count

    @property
    def total(self) -> int:
        """Forwards and backwards together."""
        return self.forwards + self.backwards


@dataclass(frozen=True)
class Stage:
    """One attack of the run: the accuracy after it, the number of images it fooled, and its cost."""

    attack: str
    robust_accuracy: Rate
    fooled: Count
    forwards: Count
    backwards: Count
    seconds: Amount


@dataclass(frozen=True, slots=True)
class Outcome:
    """The verdict on one image.

    `index` is its position in the data. `attack` is what fooled it: `clean` for a misclassified clean
    image, None for a robust one. `margin` is the label's logit minus the best other one at the adversarial image,
    or the lowest of all attacks for a robust image.
    """

    index: Count
    label: Count
    clean_prediction: Annotated[int, Limits(-1)]
    robust: bool
    attack: str | None
    margin: float


@dataclass(frozen=True)
class Curve:
    """Robust accuracy at each of the `radii`, in order, by the smallest distance that fooled each image.

    `distances` has one entry per verdict: 0 for a misclassified clean image, None if no image within the
    largest radius fooled the model. `cost` is that of the search, which is not part of the run's cost.
    """

    radii: Sequence[Amount]
    robust_accuracy: Sequence[Rate]
    distances: Sequence[Amount | None]
    cost: Cost

    def faults(self) -> Iterator[str]:
        """Yield contradictions."""
        if len(self.radii) != len(self.robust_accuracy):
            yield f"has {len(self.robust_accuracy)} accuracies at {len(self.radii)} radii"

    @classmethod
    def of(cls, radii: Sequence[float], distances: Sequence[float | None], cost: Cost) -> Curve:
        """Return the curve of these distances: an image is robust at every radius below its own."""
        n = len(distances)
        rates = [Rate.of(sum(far is None or far > radius for far in distances), n) for radius in radii]
        return cls(radii, rates, distances, cost)

    @property
    def median(self) -> float | None:
        """The median distance of the correctly classified images; infinite beyond the largest radius."""
        right = [math.inf if far is None else far for far in self.distances if far != 0]
        return statistics.median(right) if right else None


@dataclass(frozen=True)
class Stop:
    """Why a run ended before it had all `images` of its data: its `reason` is `time-limit` or `width`.

    The verdicts are then of random images, and the intervals are valid whenever it stopped. If the time was up in
    the first block, `unfinished` of its images have not met all attacks: they count as robust, and in the lower
    ends of the intervals as fooled.
    """

    reason: Annotated[str, OneOf("time-limit", "width")]
    images: Count
    unfinished: Count = 0


@dataclass(frozen=True)
class Draws:
    """A random model's robust accuracy in three ways, each by new draws at the points that the attacks found.

    `one` is by a single draw, `mean` the mean share of right draws, `majority` counts the images that are right in
    more than half of the draws: the run's own. `gap` is the difference between the mean and the accuracy if one
    wrong draw counted as a success.
    """

    one: Rate
    mean: Share
    majority: Rate
    gap: float


@dataclass(frozen=True)
class Audit:
    """Full AutoAttack on a random sample of robust images: the positions that it `broke` of `audited`.

    `robust_accuracy` estimates the share of all images that are robust to both, with a 95 % interval over both
    samples (`intervals.two_phase_interval`). `cost` is its own, which is not part of the run's cost.
    """

    audited: Sequence[Count]
    broke: Sequence[Count]
    robust_accuracy: Rate
    cost: Cost

    @classmethod
    def of(cls, audited: Sequence[int], broke: Sequence[int], robust: int, n: int, cost: Cost) -> Audit:
        """Return the audit of a run with `robust` robust images of `n`."""
        value = robust / n * (1 - len(broke) / len(audited)) if audited else 0.0
        low, high = two_phase_interval(robust, n, len(broke), len(audited))
        return cls(audited, broke, Rate(value, low, high, n), cost)


# On how many images, of those that the attacks before the arms left, a score attack among the arms is tested.
# If it alone fools a fifth of them or more, it fools none of those drawn with probability (1 - 1/5)**32 < 0.001.
SCORE_TESTED = 32


@dataclass(frozen=True)
class Strictness:
    """The remaining doubt of a suite that chose for each image which arms to run.

    At most `images`, a share `bound` of the run's, would still be fooled by an arm that did not run on them, with
    probability 95 % by a model of the arms' gains (docs/rapid.md); AutoAttack's attacks are among the arms of
    `auto`. `allowed` is the share that was allowed. Every arm ran on `in_full` of the `standing` (robust) images;
    if it ran on all, the bound is 0. (The names are keys of format 1.)
    """

    images: Count
    bound: Share
    allowed: Share
    standing: Count
    in_full: Count
