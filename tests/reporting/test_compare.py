"""Paired comparison: the interval against the literature and by simulation, the test against scipy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from reports import make_report

from robustkit.reporting.paired import compare, mcnemar, newcombe
from robustkit.runs.evaluation_record import Report


def with_robust(robust: list[bool]) -> Report:
    report = make_report(len(robust), 0, wrong=0)
    return replace(
        report,
        verdicts=[replace(image, robust=stood) for image, stood in zip(report.verdicts, robust, strict=True)],
    )


@pytest.mark.parametrize(
    ("cells", "low", "high"),
    [  # Newcombe 1998, table II, method 10: e, f, g, h of n = 50
        ((36, 12, 2, 0), 0.0569, 0.3404),
        ((54, 0, 0, 0), -0.0664, 0.0664),
    ],
)
def test_interval_has_the_published_values(cells: tuple[int, int, int, int], low: float, high: float) -> None:
    both, first, second, neither = cells
    found = newcombe(both, first, second, sum((both, first, second, neither)))
    assert found == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_interval_contains_the_difference_and_is_antisymmetric(n: int) -> None:
    for both in range(n + 1):
        for first in range(n - both + 1):
            second = n - both - first
            low, high = newcombe(both, first, second, n)
            assert -1 <= low <= (first - second) / n <= high <= 1
            assert newcombe(both, second, first, n) == pytest.approx((-high, -low))


def test_interval_has_its_nominal_coverage() -> None:
    rng = np.random.default_rng(0)
    shares, n = [0.4, 0.15, 0.1, 0.35], 120
    hits = 0
    for both, first, second, _ in rng.multinomial(n, shares, 1500):
        low, high = newcombe(int(both), int(first), int(second), n)
        hits += low <= shares[1] - shares[2] <= high
    assert 0.93 < hits / 1500 < 0.98


def test_mcnemar_has_values_computed_by_hand() -> None:
    assert mcnemar(0, 6) == pytest.approx(2 / 64)
    assert mcnemar(1, 3) == pytest.approx(2 * (1 + 4) / 16)
    assert mcnemar(4000, 6000) < 1e-80
    assert mcnemar(0, 0) == mcnemar(5, 5) == 1


def test_images_that_only_one_run_is_fooled_on() -> None:
    a = with_robust([True, True, False, False, True])
    b = with_robust([True, False, True, False, False])
    found = compare(a, b)
    assert (found.only_a, found.only_b, found.n) == ([2], [1, 4], 5)
    assert found.difference == pytest.approx(0.2)
    assert found.low < 0.2 < found.high
    same = compare(a, a)
    assert (same.difference, same.p, same.only_a, same.only_b) == (0, 1, [], [])
