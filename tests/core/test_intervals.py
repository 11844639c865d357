"""Intervals: closed forms, published values, and that they hold as often as they say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, binom

from robustkit.core.intervals import anytime_interval, clopper_pearson, images_for_width, two_phase_interval


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_sequence_is_where_the_posterior_is_dense_enough(counts: tuple[int, int]) -> None:
    hits, n = counts
    low, high = anytime_interval(hits, n)
    assert 0 <= low <= hits / n <= high <= 1
    for end in {low, high} - {0.0, 1.0}:
        assert beta.logpdf(end, 1 + hits, 1 + n - hits) == pytest.approx(np.log(0.05), abs=1e-5)


def test_an_empty_sequence_has_the_whole_interval() -> None:
    assert anytime_interval(0, 0) == (0.0, 1.0)
    assert anytime_interval(0, 50)[0] == 0.0
    assert anytime_interval(50, 50)[1] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.03, 0.3, 0.5])
def test_sequence_holds_at_all_times_at_once(share: float) -> None:
    draws = np.random.default_rng(1).random((400, 400)) < share
    missed = 0
    for row in draws:
        hits = row.cumsum()
        looked = [anytime_interval(int(hits[n - 1]), n) for n in range(10, 401, 10)]
        missed += any(not low <= share <= high for low, high in looked)
    assert missed / len(draws) <= 0.05
    # Wilson's interval, looked at as often, does not hold.
    wilson = 0
    for row in draws:
        hits = row.cumsum()
        for n in range(10, 401, 10):
            p, z = hits[n - 1] / n, 1.96
            centre, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
            if not (centre - half) <= share * (1 + z * z / n) <= centre + half:
                wilson += 1
                break
    assert wilson / len(draws) > 0.1


def test_exact_is_clopper_and_pearson() -> None:
    low, high = clopper_pearson(3, 20)
    assert binom.sf(2, 20, low) == pytest.approx(0.025)
    assert binom.cdf(3, 20, high) == pytest.approx(0.025)
    assert clopper_pearson(0, 20)[0] == 0.0
    assert clopper_pearson(20, 20)[1] == 1.0
    assert clopper_pearson(0, 0) == (0.0, 1.0)


@pytest.mark.slow
def test_two_phases_cover_the_product() -> None:
    rng = np.random.default_rng(2)
    left, survive, n, audited = 0.4, 0.9, 200, 40
    covered = 0
    for _ in range(300):
        robust = int(rng.binomial(n, left))
        broken = int(rng.binomial(audited, 1 - survive))
        low, high = two_phase_interval(robust, n, broken, audited)
        covered += low <= left * survive <= high
    assert covered / 300 >= 0.95
    assert two_phase_interval(80, 200, 0, 40)[0] > two_phase_interval(80, 200, 0, 4)[0]


@pytest.mark.parametrize("width", [0.02, 0.1, 0.4])
def test_enough_is_enough(width: float) -> None:
    n = images_for_width(0.3, width)
    low, high = anytime_interval(round(0.3 * n), n)
    assert high - low <= width
    fewer = n * 4 // 5
    low, high = anytime_interval(round(0.3 * fewer), fewer)
    assert fewer < 8 or high - low > width
