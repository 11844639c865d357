"""Which image meets which arm next, on portfolios with planted gains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import hypergeom

from robustkit.engine.allocation.arms import (
    STRATA_ENDS,
    Evidence,
    Round,
    allowed,
    following,
    spread,
    unseen,
)
from robustkit.runs.report_parts import SCORE_TESTED

COSTS = np.array([200.0, 600.0, 1800.0])


def evidence(n: int, may: int = 1, seed: int = 0) -> Evidence:
    """Images that have met no arm."""
    rng = np.random.default_rng(seed)
    left = rng.uniform(0.02, 0.9, n)
    return Evidence(
        left=np.tile(left, (len(COSTS), 1)),
        now=left,
        gains=np.full((len(COSTS), n), np.nan),
        standing=np.ones(n, bool),
        keys=rng.permutation(n),
        drawn=np.zeros((len(COSTS), n), bool),
        costs=COSTS,
        tested=np.zeros(len(COSTS), np.int64),
        allowed=may,
    )


def with_round(known: Evidence, chosen: Round, gains: np.ndarray) -> Evidence:
    """Return the evidence after a round of arms with these gains (A n)."""
    pair_counts, now, drawn = known.gains.copy(), known.now.copy(), known.drawn.copy()
    found = gains[chosen.arm, chosen.images]
    pair_counts[chosen.arm, chosen.images] = found
    now[chosen.images] = np.minimum(now[chosen.images], known.left[0, chosen.images] - np.minimum(found, 9))
    drawn[chosen.arm, chosen.images] |= chosen.test
    return replace(known, gains=pair_counts, now=now, drawn=drawn, standing=~np.isposinf(pair_counts).any(0))


def rounds(known: Evidence, gains: np.ndarray) -> Iterator[tuple[Evidence, Round]]:
    """Run to the end; yield the evidence before each round, and the round."""
    while (chosen := following(known)) is not None:
        yield known, chosen
        known = with_round(known, chosen, gains)


def pair_counts(known: Evidence, gains: np.ndarray) -> Counter[tuple[int, int]]:
    """Count each pair of arm and image."""
    return Counter((chosen.arm, int(index)) for _, chosen in rounds(known, gains) for index in chosen.images)


def test_an_image_of_each_stratum_meets_every_arm() -> None:
    known = evidence(40)
    tested = [chosen for _, chosen in rounds(known, np.zeros((3, 40))) if chosen.test]
    assert [chosen.arm for chosen in tested] == [0, 1, 2]
    for chosen in tested:
        assert sorted(known.strata[chosen.images]) == list(range(len(STRATA_ENDS)))


@given(st.integers(1, 400), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_a_fifth_of_the_images_is_seen_in_the_test_of_a_score_attack(n: int, share: float, seed: int) -> None:
    known = replace(evidence(n, seed=seed), tested=np.array([0, 0, SCORE_TESTED]))
    first = np.argsort(known.keys)[:SCORE_TESTED]
    assert set(first) <= set(known.sample(2))
    assert len(known.sample(2)) <= SCORE_TESTED + len(STRATA_ENDS)
    assert len(known.sample(0)) <= len(STRATA_ENDS)
    # None of them is among those drawn: the hypergeometric probability is at most that of the stated bound.
    kind = int(np.ceil(share * n))
    assert hypergeom.pmf(0, n, kind, len(first)) <= unseen(kind / n, len(first)) + 1e-12
    if n >= SCORE_TESTED and share >= 0.2:
        assert unseen(kind / n, len(first)) < 0.001


def test_an_arm_that_ended_early_leaves_its_gain_unknown() -> None:
    known = evidence(40)
    gains = np.full((3, 40), np.nan)
    gains[2, :10] = -np.inf
    ended = replace(known, gains=gains)
    assert (ended.open[2] == (np.arange(40) >= 10)).all()
    assert (ended.beliefs[2].some == known.beliefs[2].some).all()


@pytest.mark.parametrize("arm", [0, 1, 2])
def test_an_arm_that_fools_a_sampled_image_runs_on_its_whole_stratum(arm: int) -> None:
    known = evidence(64)
    gains = np.zeros((3, 64))
    index = known.sample(arm)[2]
    gains[arm, index] = np.inf
    pairs = pair_counts(known, gains)
    for image in np.flatnonzero(known.strata == known.strata[index]):
        # The image itself has left: it meets no other arm.
        assert pairs[arm, int(image)] == 1
    assert all(pairs[other, int(index)] <= (other < arm) for other in range(3) if other != arm)


def test_no_pair_is_scheduled_twice_and_no_fooled_image_again() -> None:
    rng = np.random.default_rng(3)
    gains = np.where(rng.random((3, 50)) < 0.2, np.inf, rng.exponential(0.02, (3, 50)))
    known = evidence(50)
    for before, chosen in rounds(known, gains):
        assert len(chosen.images)
        assert before.standing[chosen.images].all()
        assert not before.met[chosen.arm, chosen.images].any()
    assert max(pair_counts(known, gains).values()) == 1


def test_allocation_ends_with_the_bound_within_the_allowance() -> None:
    known = evidence(200, may=2)
    for before, chosen in rounds(known, np.zeros((3, 200))):
        assert chosen.test or before.bound > 2
        known = with_round(before, chosen, np.zeros((3, 200)))
    assert known.bound <= 2
    assert known.open.any()


def test_images_that_met_all_arms_add_nothing_to_the_bound() -> None:
    known = replace(evidence(9), gains=np.zeros((3, 9)))
    assert (known.bound, following(known)) == (0, None)
    broken = replace(evidence(9), standing=np.zeros(9, bool))
    assert (broken.bound, following(broken)) == (0, None)


@pytest.mark.parametrize("n", [1, 2, 30])
def test_at_allowance_zero_every_robust_image_meets_every_arm(n: int) -> None:
    gains = np.zeros((3, n))
    gains[1, 0] = np.inf
    pairs = pair_counts(evidence(n, may=0), gains)
    assert pairs == Counter({(arm, index): 1 for arm in range(3) for index in range(n) if (arm, index) != (2, 0)})


def test_sets_of_no_image_and_of_one_image() -> None:
    assert following(evidence(0)) is None
    assert following(evidence(0, may=0)) is None
    assert all(chosen.images.tolist() == [0] for _, chosen in rounds(evidence(1), np.zeros((3, 1))))


def test_decisions_do_not_depend_on_the_order_of_the_images() -> None:
    n, rng = 60, np.random.default_rng(5)
    gains = np.where(rng.random((3, n)) < 0.1, np.inf, rng.exponential(0.02, (3, n)))
    known, order = evidence(n), rng.permutation(n)
    shuffled = replace(known, left=known.left[:, order], now=known.now[order], keys=known.keys[order])
    there = [(chosen.arm, sorted(chosen.images.tolist())) for _, chosen in rounds(known, gains)]
    here = [(chosen.arm, sorted(order[chosen.images].tolist())) for _, chosen in rounds(shuffled, gains[:, order])]
    assert here == there


def test_the_allowance_is_the_stated_share_of_the_set() -> None:
    assert [allowed(0.002, n) for n in (1, 499, 1000, 10_000)] == [1, 1, 2, 20]
    assert [allowed(share, 300) for share in (0.0, 1e-9, 1.0)] == [0, 1, 300]


@pytest.mark.parametrize("count", [1, 5, 16, 40])
def test_audited_images_are_spread_over_margins(count: int) -> None:
    rng = np.random.default_rng(2)
    left, keys = rng.uniform(0, 1, 16), rng.permutation(16)
    chosen = spread(left, keys, count)
    assert len(set(chosen.tolist())) == len(chosen) == min(count, 16)
    # One of each stratum of equal size.
    ranks = np.sort(left.argsort().argsort()[chosen])
    ends = np.cumsum([0, *map(len, np.array_split(np.arange(16), max(len(chosen), 1)))])
    assert all(begin <= rank < end for begin, rank, end in zip(ends, ranks, ends[1:], strict=False))
    assert np.array_equal(chosen, np.sort(chosen))
