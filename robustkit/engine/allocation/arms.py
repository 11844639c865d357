"""Which attack to give to which images next, so that breaks come early and the doubt left can be stated.

The attacks are the arms of a suite, a portfolio of different losses, starts and step rules. Every decision is a
function of the verdicts so far, so a run that was killed goes on with the same ones. In this order:

1. An arm that broke an image of the test is given to the image's whole stratum.
2. Test: of the images that the cheap attacks left, in strata by the share of the margin left, some are drawn by
   the hash of the image, and meet every arm in its full length. Others are drawn for those that broke.
3. While the upper bound on the images that arms would still break is too high, the pairs of arm and image with the
   highest chance of a break per pass come next.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from robustkit.engine.allocation.evidence import DRAWS, Belief, learn, most

# Where strata end, as shares of the images in the order of the share left; how many standing images of each must
# have met every arm.
STRATA, DRAWN = (1 / 8, 1 / 4, 1 / 2, 1.0), 1
# A round takes the pairs whose chance per pass is at least this share of the highest, and as many images at least.
WORTH, FEWEST = 0.25, 8
# How many images' chances are held at once; more do not stay in a core's cache.
AT_ONCE = 32


@dataclass(frozen=True)
class Round:
    """One arm, by its number, for the images at these places; `test` is whether they were drawn for the test."""

    arm: int
    images: np.ndarray
    test: bool = False


@dataclass(frozen=True)
class Evidence:
    """What is known of the images that the cheap attacks left.

    Attributes:
        left: the share of each image's clean margin that the cheap attacks, and the arms before each arm in the
            suite, left (A n), from 0 to 1.
        now: the share left after all arms that each has met (n).
        gains: what each arm took off that share (A n): infinite where it broke the image, NaN where they have not
            met.
        standing: which images nothing has broken (n).
        keys: of each image, by which the test's images are drawn (n).
        drawn: which images were in a round of the test (n).
        costs: passes that each arm takes of an image (A).
        allowed: how many images the arms may still break, by the upper bound; 0 gives every image every arm.
    """

    left: np.ndarray
    now: np.ndarray
    gains: np.ndarray
    standing: np.ndarray
    keys: np.ndarray
    drawn: np.ndarray
    costs: np.ndarray
    allowed: int

    @cached_property
    def met(self) -> np.ndarray:
        """Which arm each image has met (A n)."""
        met: np.ndarray = ~np.isnan(self.gains)
        return met

    @cached_property
    def open(self) -> np.ndarray:
        """The arms that each standing image has not met (A n)."""
        unmet: np.ndarray = ~self.met & self.standing
        return unmet

    @cached_property
    def beliefs(self) -> list[Belief]:
        """What to believe of each arm."""
        return [
            learn(gains[met], left[met], stream)
            for stream, (gains, left, met) in enumerate(zip(self.gains, self.left, self.met, strict=True))
        ]

    @cached_property
    def _forecast(self) -> tuple[np.ndarray, np.ndarray]:
        """How many images would break on average for each draw (D), and the mean chances (A n); 0 if not open."""
        expected, chances = np.zeros(DRAWS), np.zeros(self.open.shape)
        for begin in range(0, len(self.now), AT_ONCE):
            part = slice(begin, begin + AT_ONCE)
            each = np.stack([belief.chance(self.now[part]) for belief in self.beliefs]) * self.open[:, None, part]
            expected += (1 - (1 - each).prod(0)).sum(1)
            chances[:, part] = each.mean(1)
        return expected, chances

    @property
    def chances(self) -> np.ndarray:
        """The chance of a break by each arm of each image (A n); 0 where it is not open."""
        return self._forecast[1]

    @cached_property
    def bound(self) -> int:
        """How many images the arms would still break at the most, with a probability of 95 %."""
        return most(self._forecast[0]) if self.open.any() else 0

    @cached_property
    def strata(self) -> np.ndarray:
        """The number of each image's stratum, by the share that the cheap attacks left (n)."""
        order = np.lexsort((self.keys, self.left[0]))
        place = np.empty(len(order))
        place[order] = (np.arange(len(order)) + 0.5) / max(len(order), 1)
        return np.searchsorted(STRATA, place)

    def sample(self) -> np.ndarray:
        """Return the places of the test's images: of each stratum the first standing ones by their keys."""
        found = []
        for stratum in range(len(STRATA)):
            there = np.flatnonzero((self.strata == stratum) & self.standing)
            found.append(there[np.argsort(self.keys[there], kind="stable")][:DRAWN])
        return np.concatenate(found)


def allowed(strictness: float, n: int) -> int:
    """Return how many of n images may be left in doubt: one of a small set, unless none may be."""
    return max(int(strictness * n), 1 if strictness else 0)


def following(evidence: Evidence) -> Round | None:
    """Return what to do next; None when the bound is low enough, or all is done where nothing may be left."""
    sample, cheapest = evidence.sample(), np.argsort(evidence.costs, kind="stable")
    for arm in cheapest:
        hit = np.unique(evidence.strata[evidence.drawn & np.isinf(evidence.gains[arm])])
        images = np.flatnonzero(np.isin(evidence.strata, hit) & evidence.open[arm])
        if len(images):
            return Round(int(arm), images)
    for arm in cheapest:
        images = sample[evidence.open[arm, sample]]
        if len(images):
            return Round(int(arm), images, test=True)
    if evidence.allowed and evidence.bound <= evidence.allowed:
        return None
    return _likeliest(evidence) if evidence.open.any() else None


def _likeliest(evidence: Evidence) -> Round:
    """Return the arm with the highest chance of a break per pass, for the images where it is nearly as high."""
    rates = evidence.chances / evidence.costs[:, None]
    arm = int(rates.max(1).argmax())
    order = np.argsort(-rates[arm], kind="stable")
    order = order[evidence.open[arm, order]]
    worth = int((rates[arm, order] >= WORTH * rates[arm].max()).sum())
    return Round(arm, np.sort(order[: max(worth, FEWEST)]))


def spread(left: np.ndarray, keys: np.ndarray, count: int) -> np.ndarray:
    """Return `count` places (all, if there are fewer) in order: one of each of so many strata of equal size.

    Strata are by what is `left` (n); of each the place with the lowest of the `keys` (n) is drawn.
    """
    strata = np.array_split(np.lexsort((keys, left)), max(min(count, len(left)), 1))
    return np.sort(np.array([stratum[keys[stratum].argmin()] for stratum in strata if len(stratum)], np.int64))
