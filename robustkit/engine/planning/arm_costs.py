"""The cost of a suite's arms, forecast from what a cost probe measured of them.

An arm's cost is not a sum over images: the test is shared by all images, and in a small set every arm runs on a
larger share. So the rounds are simulated: images are drawn like those that the probe's cheap attacks left robust,
gains from the posterior of each arm after its rounds, and `allocation.arms.following` decides as it does in the
run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.special import gammainccinv

from robustkit.engine.allocation.arms import Evidence, allowed, following
from robustkit.engine.allocation.evidence import Belief

# The number of simulations: a further one lies between their lowest and highest with probability 90 %, and more
# with the interval of the other attacks' costs added.
SIMULATIONS = 19
# Images beyond this number add to the rounds in proportion, except those of the test.
MAX_SIMULATED_IMAGES = 200


@dataclass(frozen=True)
class Observed:
    """What a cost probe measured of the arms.

    Attributes:
        evidence: on those of its images that the attacks before the arms left robust.
        images: how many the attacks before the arms ran on, fooled ones included.
        ended: whether its rounds ended.
        spent: mean forwards and backwards of each arm on an image (A 2); NaN if it did not run.
        most: the most forwards, backwards and successive passes of each on an image (A 3).
        least: the least share of these on an image that it does not fool (A).
    """

    evidence: Evidence
    images: int
    ended: bool
    spent: np.ndarray
    most: np.ndarray
    least: np.ndarray


@dataclass(frozen=True)
class SimulatedRounds:
    """Simulated rounds: the arm and number of images of each, and passes of each arm on an image (A 2)."""

    rounds: list[tuple[int, int]]
    spent: np.ndarray

    @property
    def cost(self) -> float:
        """Passes in all."""
        return float(sum(count * self.spent[arm].sum() for arm, count in self.rounds))


def forecast(seen: Observed, n: int, strictness: float, seed: int = 0) -> list[SimulatedRounds]:
    """Return simulated rounds of a run of n images, sorted by their cost.

    Args:
        seen: what the probe measured.
        n: images of the whole run.
        strictness: the share of them that may be left in doubt.
        seed: of the simulation.
    """
    if seen.images == n and seen.ended:
        met = seen.evidence.met.sum(1).tolist()
        return [
            SimulatedRounds([(arm, count) for arm, count in enumerate(met) if count], np.nan_to_num(seen.spent))
        ]
    rng = np.random.default_rng(seed)
    simulations = [_simulate(seen, n, allowed(strictness, n), rng) for _ in range(SIMULATIONS)]
    return sorted(simulations, key=lambda rounds: rounds.cost)


def _simulate(seen: Observed, n: int, may: int, rng: np.random.Generator) -> SimulatedRounds:
    cheap = _images(seen, n, rng)
    simulated = min(len(cheap), MAX_SIMULATED_IMAGES)
    more, cheap = len(cheap) / max(simulated, 1), cheap[:simulated]
    gains = np.stack([_gains(belief, simulated, rng) for belief in seen.evidence.beliefs])
    reached, drawn = np.full(gains.shape, np.nan), np.zeros(gains.shape, bool)
    keys, may = rng.permutation(simulated), _fewer(may, more)
    rounds = []
    while simulated:
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
        drawn[arm, images] |= chosen.test
        rounds.append((arm, len(images) if chosen.test else round(more * len(images))))
    return SimulatedRounds(rounds, _spent(seen, rng))


def _fewer(may: int, times: float) -> int:
    """Return the bound for `times` fewer images that allows the same expected share as `may` does for all.

    95 % bounds do not grow in proportion to the expected number.
    """
    expected = gammainccinv(np.arange(may + 1) + 1, 0.95)
    return max(int(np.abs(expected * times - expected[-1]).argmin()), min(may, 1))


def _images(seen: Observed, n: int, rng: np.random.Generator) -> np.ndarray:
    """Return the shares left of n images after the attacks before the arms: the probe's, and more like them.

    The others are drawn with random weights (a Bayesian bootstrap), with one further image of any share.
    """
    shares = seen.evidence.left[0]
    counts = rng.multinomial(n - seen.images, rng.dirichlet(np.ones(seen.images + 1)))
    likewise = np.repeat(shares, counts[: len(shares)])
    found = np.concatenate([shares, likewise, 1 - rng.random(counts[-1])])
    return rng.permutation(found)


def _gains(belief: Belief, n: int, rng: np.random.Generator) -> np.ndarray:
    """Return what an arm gains on n images, by one draw from the posterior."""
    draw = rng.integers(len(belief.some))
    some, typical, shape = (float(values[draw, 0]) for values in (belief.some, belief.typical, belief.shape))
    tail = typical * shape * ((1 - rng.random(n)) ** (-1 / shape) - 1)
    return np.where(rng.random(n) < some, tail, 0.0)


def _spent(seen: Observed, rng: np.random.Generator) -> np.ndarray:
    """Return the passes of each arm on an image; drawn on a logarithmic scale if it did not run."""
    share = seen.least ** rng.random(len(seen.least))
    return np.where(np.isnan(seen.spent), seen.most[:, :2] * share[:, None], seen.spent)
