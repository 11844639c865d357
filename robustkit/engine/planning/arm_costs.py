"""What the arms of a suite will cost, from what a pilot saw of them.

An arm's cost is not an image's own: the test is shared by all images of a set, and a small set is given more of
every arm than a large one. So the rounds are played: images are drawn like those that the pilot's cheap attacks
left, gains from what its rounds say of each arm, and `allocation.following` decides as it would in the run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.special import gammainccinv

from robustkit.engine.allocation.arms import Evidence, allowed, following
from robustkit.engine.allocation.evidence import Belief

# One more play lies between the lowest and the highest of so many with a probability of 90 %; the interval of what
# images cost before, whose ends are added, makes it more.
PLAYS = 19
# Images beyond so many add to the rounds in proportion, but for those of the test.
MOST_PLAYED = 200


@dataclass(frozen=True)
class Observed:
    """What a pilot saw of the arms.

    Attributes:
        evidence: of those of its images that the attacks before the arms left.
        images: how many had met the attacks before the arms, those that fell to them included.
        ended: whether its rounds came to their end.
        spent: forwards and backwards that each arm took of an image on average (A 2); NaN where none has met it.
        most: forwards, backwards and successive passes that each takes of an image at the most (A 3).
        least: the share of them that each takes of an image which it does not break (A).
    """

    evidence: Evidence
    images: int
    ended: bool
    spent: np.ndarray
    most: np.ndarray
    least: np.ndarray


@dataclass(frozen=True)
class Play:
    """Rounds as they may be: of each its arm and how many images it is given; what arms take of an image (A 2)."""

    rounds: list[tuple[int, int]]
    spent: np.ndarray

    @property
    def cost(self) -> float:
        """Propagations in all."""
        return float(sum(count * self.spent[arm].sum() for arm, count in self.rounds))


def forecast(seen: Observed, n: int, strictness: float, seed: int = 0) -> list[Play]:
    """Return the rounds of a run of n images as they may be, in rising order of what they cost.

    Args:
        seen: what the pilot saw.
        n: images of the whole run.
        strictness: the share of them that may be left in doubt.
        seed: of all draws.
    """
    if seen.images == n and seen.ended:
        met = seen.evidence.met.sum(1).tolist()
        return [Play([(arm, count) for arm, count in enumerate(met) if count], np.nan_to_num(seen.spent))]
    rng = np.random.default_rng(seed)
    plays = [_play(seen, n, allowed(strictness, n), rng) for _ in range(PLAYS)]
    return sorted(plays, key=lambda play: play.cost)


def _play(seen: Observed, n: int, may: int, rng: np.random.Generator) -> Play:
    cheap = _images(seen, n, rng)
    played = min(len(cheap), MOST_PLAYED)
    more, cheap = len(cheap) / max(played, 1), cheap[:played]
    gains = np.stack([_gains(belief, played, rng) for belief in seen.evidence.beliefs])
    reached, drawn = np.full(gains.shape, np.nan), np.zeros(played, bool)
    keys, may = rng.permutation(played), _fewer(may, more)
    rounds = []
    while played:
        left = np.fmin.accumulate(np.concatenate([cheap[None], reached[:-1]]))
        broken = reached <= 0
        evidence = replace(
            seen.evidence,
            left=left,
            now=np.fmin(left[-1], reached[-1]),
            gains=np.where(broken, np.inf, left - reached),
            standing=~np.logical_or.reduce(broken),
            keys=keys,
            drawn=drawn.copy(),
            allowed=may,
        )
        chosen = following(evidence)
        if chosen is None:
            break
        arm, images = chosen.arm, chosen.images
        reached[arm, images] = left[arm, images] - gains[arm, images]
        drawn[images] |= chosen.test
        rounds.append((arm, len(images) if chosen.test else round(more * len(images))))
    return Play(rounds, _spent(seen, rng))


def _fewer(may: int, times: float) -> int:
    """Return how many breaks of so many times fewer images ask for as few to be expected of each as `may` of all.

    Where few may be left, fewer still may be expected: 95 % bounds do not grow in proportion.
    """
    expected = gammainccinv(np.arange(may + 1) + 1, 0.95)
    return max(int(np.abs(expected * times - expected[-1]).argmin()), min(may, 1))


def _images(seen: Observed, n: int, rng: np.random.Generator) -> np.ndarray:
    """Return the shares left of n images that the attacks before the arms leave: the pilot's, and more like them.

    Of those more, weights are drawn as well, with one image besides that is left with any share.
    """
    shares = seen.evidence.left[0]
    counts = rng.multinomial(n - seen.images, rng.dirichlet(np.ones(seen.images + 1)))
    likewise = np.repeat(shares, counts[: len(shares)])
    found = np.concatenate([shares, likewise, 1 - rng.random(counts[-1])])
    return rng.permutation(found)


def _gains(belief: Belief, n: int, rng: np.random.Generator) -> np.ndarray:
    """Return what an arm gains on n images, by one draw from the belief."""
    draw = rng.integers(len(belief.some))
    some, typical, shape = (float(of[draw, 0]) for of in (belief.some, belief.typical, belief.shape))
    tail = typical * shape * ((1 - rng.random(n)) ** (-1 / shape) - 1)
    return np.where(rng.random(n) < some, tail, 0.0)


def _spent(seen: Observed, rng: np.random.Generator) -> np.ndarray:
    """Return what each arm takes of an image; where none has met it, drawn on a logarithmic scale."""
    share = seen.least ** rng.random(len(seen.least))
    return np.where(np.isnan(seen.spent), seen.most[:, :2] * share[:, None], seen.spent)
