"""How likely an attack is to break an image, learned from what it gained on other images of the same net.

A gain is how much lower an attack brings the margin than the cheap attacks before it did, as a share of the clean
margin: the unit is the image's own, so no constant is in logits or pixels. An image with the share `left` breaks
where the gain is at least `left`. The model of gains: with some chance an attack gains anything at all; if so, the
gain has a Lomax (shifted Pareto) distribution. Chance, scale and shape of the tail are unknown, and have a prior
that was fitted on the open half of the nets of scripts/reproductions/train_zoo.py (docs/rapid.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.special import betaincinv, gammaincc

# Draws from the posterior, by which all chances are averaged.
DRAWS = 256
SCALES = np.geomspace(1e-5, 1.0, 51)
SHAPES = np.array([2.0, 3.0, 5.0, 8.0, 16.0])


@dataclass(frozen=True)
class Prior:
    """What is believed of an attack before it was tried on a net.

    Attributes:
        gained: pseudo-count of images on which it gained something.
        idle: pseudo-count of images on which it did not.
        scale: median of the scale of its gains, as a share of the clean margin.
        spread: standard deviation of the scale's natural logarithm.
    """

    gained: float
    idle: float
    scale: float
    spread: float

    @cached_property
    def grid(self) -> np.ndarray:
        """The logarithm of the prior density at each scale and shape (S, P), up to a constant."""
        distance = (np.log(SCALES) - np.log(self.scale)) / self.spread
        return np.repeat(-0.5 * distance[:, None] ** 2, len(SHAPES), 1)


# By what an attack needs of the model.
PRIORS = {"gradient": Prior(1.0, 8.0, 0.01, 1.5), "score": Prior(0.05, 8.0, 0.01, 1.5)}


@dataclass(frozen=True)
class Belief:
    """Draws (D) from the posterior of one attack on one net: chance of any gain, scale and shape of the tail."""

    some: np.ndarray
    scale: np.ndarray
    shape: np.ndarray

    def chance(self, left: np.ndarray) -> np.ndarray:
        """Return the chance (D, n) that the attack breaks images with these shares of the margin left (n)."""
        tail = (1 + left[None, :] / self.scale[:, None]) ** -self.shape[:, None]
        return self.some[:, None] * tail


def learn(prior: Prior, gains: np.ndarray, left: np.ndarray, stream: int = 0) -> Belief:
    """Return what to believe of an attack after it was tried on n images.

    Args:
        prior: the belief before.
        gains: what it gained on each image, a share of the clean margin (n); infinite where it broke the image.
        left: what the cheap attacks had left of each image's margin (n).
        stream: sets the draws of several attacks apart.
    """
    broke = np.isinf(gains)
    inside = (gains > 0) & ~broke
    some = float(broke.sum() + inside.sum())
    shape = SHAPES[None, :]
    # Of a broken image only a lower end of the gain is known.
    logs = prior.grid.copy()
    for gain in gains[inside]:
        logs += np.log(shape / SCALES[:, None]) - (shape + 1) * np.log1p(gain / SCALES[:, None])
    for share in left[broke]:
        logs -= shape * np.log1p(share / SCALES[:, None])
    weights = np.exp(logs - logs.max()).ravel()
    order = np.random.default_rng(stream)
    levels = (np.arange(DRAWS) + 0.5) / DRAWS
    cell = np.searchsorted(np.cumsum(weights) / weights.sum(), order.permutation(levels)).clip(
        max=len(weights) - 1
    )
    chance = betaincinv(prior.gained + some, prior.idle + len(gains) - some, order.permutation(levels))
    return Belief(chance, SCALES[cell // len(SHAPES)], SHAPES[cell % len(SHAPES)])


def most(expected: np.ndarray, level: float = 0.95) -> int:
    """Return the least m such that at most m images break with probability `level`.

    `expected` (D) is how many break on average, for each draw from the posterior; given it, their number is
    Poisson's, of which the sum of independent rare events has no heavier tail.
    """
    m = 0
    while gammaincc(m + 1, expected).mean() < level:
        m += 1
    return m
