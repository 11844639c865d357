"""Which attack runs on which images next, so that images are fooled early and the remaining doubt is bounded.

The attacks are the arms of a suite, a portfolio of different losses, starts and step rules. Every decision is a
function of the verdicts so far, so a killed run continues with the same ones. In this order:

1. An arm that fooled an image of the test runs on the image's whole stratum.
2. Test: of the images that the cheap attacks left robust, in strata by the share of the margin left, some are
   drawn by the hash of the image, and every arm runs on them. Fooled ones are replaced by others. A score attack
   runs on `SCORE_TESTED` images drawn from all strata together, or on all of fewer.
3. While the upper bound on the images that arms would still fool is too high, the pairs of arm and image with the
   highest probability of success per pass come next.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from robustkit.engine.allocation.evidence import DRAWS, Belief, learn, upper_bound

# The upper ends of the strata, as shares of the images in the order of the margin left, and how many robust images
# of each every arm must run on.
STRATA_ENDS, TESTED_PER_STRATUM = (1 / 8, 1 / 4, 1 / 2, 1.0), 1
# A round takes the images whose probability per pass is at least this share of the highest, and at least so many.
MIN_RATE_SHARE, MIN_ROUND_IMAGES = 0.25, 8
# Rounds of a score attack are larger: their many steps take as long for a few images as for more.
MIN_SCORE_ROUND_IMAGES = 24
# Images whose probabilities are computed at once; more do not fit a core's cache.
IMAGES_AT_ONCE = 32


@dataclass(frozen=True)
class Round:
    """One arm, by its number, for the images at these indices; `test` is whether they were drawn for the test."""

    arm: int
    images: np.ndarray
    test: bool = False


@dataclass(frozen=True)
class Evidence:
    """The data on the images that the cheap attacks did not fool.

    Attributes:
        left: the share of each image's clean margin that remains after the cheap attacks and the arms before each
            arm in the suite (A n), from 0 to 1.
        now: the share left after all arms that ran on it (n).
        gains: the reduction of that share by each arm (A n): infinite if it fooled the image, NaN if it did not
            run, minus infinity if it ended early: it did not fool the image, and its gain is not known.
        standing: which images are robust so far (n).
        keys: a number of each image, by which test images are drawn (n).
        drawn: which images were in a round of each arm's test (A n).
        costs: passes of each arm on an image (A).
        tested: how many images each arm is tested on besides those that all are (A).
        allowed: how many images the arms may still fool, by the upper bound; 0 runs every arm on every image.
    """

    left: np.ndarray
    now: np.ndarray
    gains: np.ndarray
    standing: np.ndarray
    keys: np.ndarray
    drawn: np.ndarray
    costs: np.ndarray
    tested: np.ndarray
    allowed: int

    @cached_property
    def met(self) -> np.ndarray:
        """Which arms ran on each image (A n)."""
        met: np.ndarray = ~np.isnan(self.gains)
        return met

    @cached_property
    def open(self) -> np.ndarray:
        """Which arms have not run on each robust image (A n)."""
        unmet: np.ndarray = ~self.met & self.standing
        return unmet

    @cached_property
    def beliefs(self) -> list[Belief]:
        """The posterior of each arm."""
        known = self.met & ~np.isneginf(self.gains)
        return [
            learn(gains[met], left[met], stream)
            for stream, (gains, left, met) in enumerate(zip(self.gains, self.left, known, strict=True))
        ]

    @cached_property
    def _forecast(self) -> tuple[np.ndarray, np.ndarray]:
        """Expected number of fooled images for each draw (D), and mean probabilities (A n), 0 if not open."""
        expected, chances = np.zeros(DRAWS), np.zeros(self.open.shape)
        for begin in range(0, len(self.now), IMAGES_AT_ONCE):
            part = slice(begin, begin + IMAGES_AT_ONCE)
            each = np.stack([belief.chance(self.now[part]) for belief in self.beliefs]) * self.open[:, None, part]
            expected += (1 - (1 - each).prod(0)).sum(1)
            chances[:, part] = each.mean(1)
        return expected, chances

    @property
    def chances(self) -> np.ndarray:
        """The probability that each arm fools each image (A n); 0 where it is not open."""
        return self._forecast[1]

    @cached_property
    def bound(self) -> int:
        """How many images the arms would still fool at most, with probability 95 %."""
        return upper_bound(self._forecast[0]) if self.open.any() else 0

    @cached_property
    def strata(self) -> np.ndarray:
        """The number of each image's stratum, by the share that remains after the cheap attacks (n)."""
        order = np.lexsort((self.keys, self.left[0]))
        rank = np.empty(len(order))
        rank[order] = (np.arange(len(order)) + 0.5) / max(len(order), 1)
        return np.searchsorted(STRATA_ENDS, rank)

    def sample(self, arm: int) -> np.ndarray:
        """Return the indices of the images of an arm's test.

        Of each stratum these are the first robust ones by their keys, and then the first of all strata until there
        are as many as the arm is tested on.
        """
        chosen = []
        for stratum in range(len(STRATA_ENDS)):
            there = np.flatnonzero((self.strata == stratum) & self.standing)
            chosen.append(there[np.argsort(self.keys[there], kind="stable")][:TESTED_PER_STRATUM])
        first = np.argsort(self.keys, kind="stable")[: self.tested[arm]]
        return np.unique(np.concatenate([*chosen, first[self.standing[first]]]))


def allowed(strictness: float, n: int) -> int:
    """Return how many of n images may be left in doubt: at least one unless the strictness is 0."""
    return max(int(strictness * n), 1 if strictness else 0)


def unseen(share: float, drawn: int) -> float:
    """Return the probability that a draw of so many images has none of a kind that is this share of all.

    It is an upper bound: the images are drawn without replacement.
    """
    return float((1 - share) ** drawn)


def following(evidence: Evidence) -> Round | None:
    """Return the next round; None if the bound is low enough, or every arm has run on every robust image."""
    cheapest = np.argsort(evidence.costs, kind="stable")
    for arm in cheapest:
        hit = np.unique(evidence.strata[evidence.drawn[arm] & np.isposinf(evidence.gains[arm])])
        images = np.flatnonzero(np.isin(evidence.strata, hit) & evidence.open[arm])
        if len(images):
            return Round(int(arm), images)
    for arm in cheapest:
        sample = evidence.sample(arm)
        images = sample[evidence.open[arm, sample]]
        if len(images):
            return Round(int(arm), images, test=True)
    if evidence.allowed and evidence.bound <= evidence.allowed:
        return None
    return _most_promising(evidence) if evidence.open.any() else None


def _most_promising(evidence: Evidence) -> Round:
    """Return the arm with the highest probability of success per pass, for images where it is nearly as high."""
    rates = evidence.chances / evidence.costs[:, None]
    arm = int(rates.max(1).argmax())
    order = np.argsort(-rates[arm], kind="stable")
    order = order[evidence.open[arm, order]]
    worth = int((rates[arm, order] >= MIN_RATE_SHARE * rates[arm].max()).sum())
    least = MIN_SCORE_ROUND_IMAGES if evidence.tested[arm] else MIN_ROUND_IMAGES
    return Round(arm, np.sort(order[: max(worth, least)]))


def spread(left: np.ndarray, keys: np.ndarray, count: int) -> np.ndarray:
    """Return `count` indices (all, if there are fewer) in order: one of each of `count` strata of equal size.

    Strata are by `left` (n); of each the index with the lowest of the `keys` (n) is drawn.
    """
    strata = np.array_split(np.lexsort((keys, left)), max(min(count, len(left)), 1))
    return np.sort(np.array([stratum[keys[stratum].argmin()] for stratum in strata if len(stratum)], np.int64))
