"""The model of an attack's success rate against closed forms and known rates."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import poisson

from robustkit.engine.allocation.evidence import Belief, learn, upper_bound

LEFT = np.linspace(0.01, 0.9, 12)


def without_success(n: int) -> Belief:
    """What is believed after n images on which nothing was gained."""
    return learn(np.zeros(n), np.full(n, 0.5))


def test_more_images_without_success_lower_every_probability() -> None:
    chances = [without_success(n).chance(LEFT).mean(0) for n in (0, 1, 4, 16, 64, 256)]
    assert (np.diff(chances, axis=0) < 0).all()


def test_a_success_raises_every_probability_more_if_the_image_had_a_large_margin() -> None:
    left = np.full(8, 0.5)
    gains = np.zeros(8)
    before = learn(gains, left).chance(LEFT).mean(0)
    found = []
    for share in (0.02, 0.5):
        gains[0], left[0] = np.inf, share
        found.append(learn(gains, left).chance(LEFT).mean(0))
        assert (found[-1] > before).all()
    assert (found[1] > found[0]).all()


def test_the_probability_falls_with_the_remaining_images() -> None:
    belief = learn(np.array([0.01, 0.02, 0.0, np.inf]), np.full(4, 0.05))
    chance = belief.chance(LEFT)
    assert chance.shape == (len(belief.some), len(LEFT))
    assert (np.diff(chance, axis=1) <= 0).all()
    assert ((chance >= 0) & (chance <= belief.some)).all()


@pytest.mark.parametrize(("share", "typical", "shape"), [(0.6, 0.01, 3.0), (0.3, 0.03, 8.0), (0.9, 0.003, 2.0)])
def test_posterior_intervals_cover_known_success_rates(share: float, typical: float, shape: float) -> None:
    """The true chance lies within the middle 95 % of the draws, about as often as that says."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(40):
        left = rng.uniform(0.02, 0.5, 40)
        tail = typical * shape * (rng.random(40) ** (-1 / shape) - 1)
        gains = np.where(rng.random(40) < share, tail, -0.001)
        belief = learn(np.where(gains >= left, np.inf, gains), left)
        low, high = np.quantile(belief.chance(np.array([0.05])), [0.025, 0.975])
        held += low <= share * (1 + 0.05 / (shape * typical)) ** -shape <= high
    assert held >= 35


@pytest.mark.parametrize("expected", [0.0, 0.01, 0.05, 0.06, 0.7, 3.0, 40.0])
def test_the_upper_bound_is_the_quantile_of_a_poisson_number(expected: float) -> None:
    assert upper_bound(np.full(7, expected)) == poisson.ppf(0.95, expected).clip(0)


def test_the_upper_bound_is_the_quantile_of_a_mixture_if_rates_differ() -> None:
    expected = np.array([0.1, 0.2, 9.0, 11.0])
    m = upper_bound(expected)
    assert poisson.cdf(m - 1, expected).mean() < 0.95 <= poisson.cdf(m, expected).mean()
