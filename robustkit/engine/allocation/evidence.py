"""How likely an attack is to fool an image, learned from what it gained on other images of the same net.

A gain is the further reduction of the margin by an attack, below that of the cheap attacks and the attacks listed
before it, as a share of the clean margin. So no constant is in logits or pixels. An image is fooled if the gain is
at least the remaining share. The model of gains: with some probability an attack gains anything at all; if so, the
gain exceeds g with the probability (1 + g / (shape * typical)) ** -shape, a Lomax distribution, which is close to
an exponential one for a large shape. Probability, typical gain and shape are unknown, with a prior that was chosen
on open nets of scripts/reproductions/train_zoo.py (docs/rapid.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import betaincinv, gammaincc

# Draws from the posterior over which probabilities are averaged.
DRAWS = 256
# Gains for which the whole grid is computed at once.
GAINS_AT_ONCE = 1024
GAINS = np.geomspace(1e-5, 1.0, 51)[:, None]
SHAPES = np.array([2.0, 3.0, 5.0, 8.0, 16.0])[None, :]


@dataclass(frozen=True)
class Prior:
    """The prior of an attack on a net.

    Attributes:
        gained: pseudo-count of images on which it gained something.
        idle: pseudo-count of images on which it did not.
        typical: median of the typical gain, as a share of the clean margin.
        spread: standard deviation of its natural logarithm.
    """

    gained: float
    idle: float
    typical: float
    spread: float

    @property
    def grid(self) -> np.ndarray:
        """The logarithm of the prior density at each typical gain and shape (G, S), up to a constant."""
        density: np.ndarray = -0.5 * ((np.log(GAINS) - np.log(self.typical)) / self.spread) ** 2 + 0 * SHAPES
        return density


# Little weight on either side: on most nets an arm gains nothing, on others often.
PRIOR = Prior(gained=0.1, idle=0.4, typical=0.014, spread=0.8)


@dataclass(frozen=True)
class Belief:
    """Draws (D 1) from the posterior of one attack on one net: probability of any gain, typical gain, shape."""

    some: np.ndarray
    typical: np.ndarray
    shape: np.ndarray

    def chance(self, left: np.ndarray) -> np.ndarray:
        """Return the probability (D, n) that the attack fools images with these shares of the margin left (n)."""
        chance: np.ndarray = self.some * (1 + left / (self.shape * self.typical)) ** -self.shape
        return chance


def learn(gains: np.ndarray, left: np.ndarray, stream: int = 0, prior: Prior = PRIOR) -> Belief:
    """Return the posterior of an attack after it ran on n images.

    Args:
        gains: its gain on each image, a share of the clean margin (n); infinite if it fooled the image.
        left: the remaining share of each image's margin before (n).
        stream: separates the random draws of several attacks.
        prior: of the attack.
    """
    broke = np.isinf(gains)
    inside = (gains > 0) & ~broke
    some = float(broke.sum() + inside.sum())
    logs = prior.grid - inside.sum() * np.log(GAINS) - (SHAPES + 1) * _logs(gains[inside])
    # For a fooled image only a lower bound of the gain is known.
    logs = logs - SHAPES * _logs(left[broke])
    total = np.cumsum(np.exp(logs - logs.max()))
    order, levels = np.random.default_rng(stream), (np.arange(DRAWS) + 0.5) / DRAWS
    row, column = np.divmod(np.searchsorted(total, total[-1] * order.permutation(levels)), SHAPES.size)
    chance = betaincinv(prior.gained + some, prior.idle + len(gains) - some, order.permutation(levels))
    return Belief(chance[:, None], GAINS[row], SHAPES.T[column])


def _logs(gains: np.ndarray) -> np.ndarray:
    """Return the sum of log(1 + gain / (shape * typical)) over the gains (n), for each typical gain and shape."""
    total = np.zeros((len(GAINS), SHAPES.size))
    for begin in range(0, len(gains), GAINS_AT_ONCE):
        part = gains[begin : begin + GAINS_AT_ONCE, None, None]
        total += np.log1p(part / (SHAPES * GAINS)).sum(0)
    return total


def upper_bound(expected: np.ndarray, level: float = 0.95) -> int:
    """Return the least m such that at most m images are fooled with probability `level`.

    `expected` (D) is the expected number of each draw from the posterior. Given it, the number is Poisson
    distributed, whose tail is no lighter than that of a sum of independent rare events.
    """
    m = 0
    while gammaincc(m + 1, expected).mean() < level:
        m += 1
    return m
