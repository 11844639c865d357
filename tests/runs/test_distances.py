"""Minimum norms in numbers: quantiles, the median's interval, two runs compared, records, page, table, export."""

from __future__ import annotations

import csv
import io
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from reports import make_examples, make_report
from rich.console import Console
from scipy import stats

from robustkit.core.errors import UsageError
from robustkit.core.intervals import median_ranks
from robustkit.reporting.exports.verdicts import SMALLEST, rows, to_csv
from robustkit.reporting.html.evaluation import page
from robustkit.reporting.paired import mcnemar
from robustkit.reporting.paired_distances import compare_distances
from robustkit.reporting.terminal.evaluation import show
from robustkit.runs.distances import Middle, Minimum, quantile
from robustkit.runs.evaluation_record import Report


def with_minimum(distances: list[float | None], threat: str = "l2:min") -> Report:
    """Return a report of these distances; those that are 0 come first."""
    found = sum(far is not None and far > 0 for far in distances)
    report = make_report(len(distances), found, wrong=distances.count(0), threat=threat)
    return replace(report, minimum=Minimum.of(distances))


@pytest.mark.parametrize("n", [0, 1, 5, 6, 9, 10, 40, 301])
def test_the_medians_interval_is_that_of_the_sign_test(n: int) -> None:
    low, high = median_ranks(n)
    assert low + high == n - 1
    # Below the lower end lie at most `low` numbers with a chance of at most 2.5 %, and `low + 1` with more.
    assert low < 0 or stats.binom.cdf(low, n, 0.5) <= 0.025
    assert stats.binom.cdf(low + 1, n, 0.5) > 0.025


def test_the_medians_interval_has_its_nominal_coverage() -> None:
    rng = np.random.default_rng(0)
    draws = np.sort(rng.exponential(size=(2000, 41)))
    low, high = median_ranks(41)
    covered = ((draws[:, low] <= math.log(2)) & (draws[:, high] >= math.log(2))).mean()
    assert 0.95 <= covered < 0.985


@pytest.mark.parametrize("share", [0, 0.05, 0.25, 0.5, 0.95, 1])
def test_quantiles_equal_numpys(share: float) -> None:
    numbers = sorted(np.random.default_rng(1).random(17).tolist())
    assert quantile(numbers, share) == pytest.approx(np.quantile(numbers, share))


def test_infinite_and_missing_distances() -> None:
    found = Minimum.of([0, 0.5, None, 0.25, 0.75])
    assert found.right == [0.25, 0.5, 0.75, math.inf]
    assert found.quantiles == {
        "0.05": pytest.approx(0.2875),
        "0.25": 0.4375,
        "0.5": 0.625,
        "0.75": None,
        "0.95": None,
    }
    assert found.median == Middle(0.625, None, None)
    assert list(found.curve()) == [(0, 0.8), (0.25, 0.6), (0.5, 0.4), (0.75, 0.2)]
    assert Minimum.of([0, 0]).median == Middle(None, None, None)


def test_the_difference_of_two_runs_is_paired() -> None:
    a = with_minimum([0, 0, 0.5, 0.75, 1.0, None, None])
    b = with_minimum([0, 0.25, 0.25, 0.75, 0.5, 3.0, None])
    found = compare_distances(a, b)
    # The first image is wrong in both; the second in A alone.
    assert (found.n, found.farther_a, found.farther_b, found.equal) == (6, 3, 1, 2)
    assert found.difference.value == pytest.approx(0.125)
    assert found.p == mcnemar(3, 1)
    mirrored = compare_distances(b, a)
    assert mirrored.difference.value == pytest.approx(-0.125)
    assert (mirrored.farther_a, mirrored.farther_b) == (1, 3)
    same = compare_distances(a, a)
    assert (same.difference.value, same.equal, same.p) == (0, 5, 1)


def test_runs_of_other_threats_are_not_compared() -> None:
    norms = with_minimum([0, 0.5]), with_minimum([0, 0.5], "linf:min")
    for pair in (norms, (norms[0], make_report(2, 1, wrong=1))):
        with pytest.raises(UsageError, match=r"^the runs have threats l2:min and linf:[^\n]+\.$"):
            compare_distances(*pair)


@pytest.mark.parametrize("distances", [[0, 0.5, None, 0.25], [0, 0], [None], [1e-9, 2e7]], ids=str)
def test_distances_are_in_record_page_and_table(distances: list[float | None]) -> None:
    report = with_minimum(distances)
    assert Report.from_json(report.to_json()) == report
    text = page(report, make_examples(report))
    assert not re.search(r">[^<]*\b(nan|inf)\b", text)
    assert ("Robust accuracy against eps" in text, "Accuracy left after" in text) == (True, False)
    console = Console(file=io.StringIO(), width=120)
    show(report, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"\nminimum norm( +[\d.e+−-]+|  +–){5}", printed)
    assert "robust acc" not in printed


@pytest.mark.parametrize("change", ["missing", "short"])
def test_a_record_without_its_distances_is_refused(change: str) -> None:
    body = with_minimum([0, 0.5, 0.25]).to_json()
    if change == "missing":
        del body["minimum"]
    else:
        body["minimum"]["distances"].pop()
    with pytest.raises(UsageError, match="minimum norms"):
        Report.from_json(body)


def test_export_has_the_distance_of_every_image() -> None:
    report = with_minimum([0, 0.5, 0.25, None])
    table = list(csv.DictReader(io.StringIO(to_csv(rows(report, None)).decode(), newline="")))
    assert [row[SMALLEST] for row in table] == ["0", "0.5", "0.25", ""]
