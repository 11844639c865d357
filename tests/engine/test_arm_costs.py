"""The cost of arms on larger sets, simulated from a probe's measurements."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from robustkit.engine.allocation.arms import Evidence
from robustkit.engine.planning import arm_costs as forecasting
from robustkit.engine.planning.arm_costs import Observed, forecast

MOST = np.array([[100.0, 100.0, 101.0], [300.0, 300.0, 101.0], [500.0, 0.0, 500.0]])


@pytest.fixture(autouse=True)
def _few_simulations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecasting, "SIMULATIONS", 3)
    monkeypatch.setattr(forecasting, "MAX_SIMULATED_IMAGES", 60)


def measured(met: int, left: int = 10, images: int = 20, ended: bool = False) -> Observed:
    """A probe on some images, `left` of them robust so far; `met` of these met all arms without success."""
    gains = np.full((3, left), np.nan)
    gains[:, :met] = 0.0
    shares = np.linspace(0.1, 0.9, left)
    evidence = Evidence(
        left=np.tile(shares, (3, 1)),
        now=shares,
        gains=gains,
        standing=np.ones(left, bool),
        keys=np.arange(left),
        drawn=np.zeros((3, left), bool),
        costs=MOST[:, :2].sum(1),
        tested=np.zeros(3, np.int64),
        allowed=1,
    )
    spent = np.where(met, [[100.0, 99.0], [300.0, 297.0], [60.0, 0.0]], np.nan)
    return Observed(evidence, images, ended, spent, MOST, np.array([1.0, 1.0, 0.1]))


def test_a_probe_of_all_images_leaves_nothing_to_simulate() -> None:
    (play,) = forecast(measured(4, ended=True), 20, 0.002)
    assert play.rounds == [(0, 4), (1, 4), (2, 4)]
    assert play.cost == 4 * (199 + 597 + 60)


def test_at_allowance_zero_each_remaining_image_meets_all_arms() -> None:
    for play in forecast(measured(6, left=20), 2000, strictness=0.0):
        given = [sum(count for arm, count in play.rounds if arm == number) for number in range(3)]
        # But for those that an arm before it is played to break.
        assert given == sorted(given, reverse=True)
        assert 1600 < given[2] <= given[0] <= 2000


def test_an_image_of_a_large_set_costs_less_than_one_of_a_small_set() -> None:
    costs = [np.mean([play.cost for play in forecast(measured(8), n, 0.002)]) / n for n in (30, 300, 30_000)]
    assert costs[0] > 2 * costs[1] > 0
    assert costs[0] > 2 * costs[2] > 0


def test_no_arm_costs_more_than_all_images_would_take_in_full() -> None:
    plays = forecast(measured(0), 50, 0.002)
    assert [play.cost for play in plays] == sorted(play.cost for play in plays)
    for play in plays:
        assert 0 < play.cost <= 50 * MOST[:, :2].sum()
        assert 50 <= play.spent[2, 0] <= 500
        assert (play.spent[:2] == MOST[:2, :2]).all()


def test_few_robust_images_are_expected_where_all_were_fooled_before_the_arms() -> None:
    observed = measured(0, left=0, images=40)
    assert all(sum(count for _, count in play.rounds) < 400 * 3 for play in forecast(observed, 400, 0.002))
    assert forecast(replace(observed, ended=True), 40, 0.002)[0].cost == 0
