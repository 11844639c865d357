"""Compare two runs on the same images: the paired difference, its interval, and McNemar's test."""

from __future__ import annotations

import math
from dataclasses import dataclass

from robustkit.core.errors import UsageError
from robustkit.runs.evaluation_record import Report
from robustkit.runs.report_parts import Rate


@dataclass(frozen=True)
class Comparison:
    """The paired comparison of two runs, A and B.

    Attributes:
        n: number of images that both runs have.
        difference: A's robust accuracy minus B's.
        low: lower end of its 95 % interval.
        high: upper end.
        p: of McNemar's exact two-sided test.
        only_a: indices of the images that are not robust in A only.
        only_b: likewise in B.
    """

    n: int
    difference: float
    low: float
    high: float
    p: float
    only_a: list[int]
    only_b: list[int]


def compare(a: Report, b: Report) -> Comparison:
    """Return the comparison of two reports on the images that both have; their data must be the same.

    Raises:
        UsageError: if they have no image in common, because runs were stopped early.
    """
    others = {verdict.index: verdict for verdict in b.verdicts}
    pairs = [(verdict, others[verdict.index]) for verdict in a.verdicts if verdict.index in others]
    if not pairs:
        raise UsageError("the two runs stopped early and have no image in common; let one of them finish.")
    only_a = [first.index for first, second in pairs if second.robust and not first.robust]
    only_b = [first.index for first, second in pairs if first.robust and not second.robust]
    both = sum(first.robust and second.robust for first, second in pairs)
    low, high = newcombe(both, len(only_b), len(only_a), len(pairs))
    difference = (len(only_b) - len(only_a)) / len(pairs)
    return Comparison(len(pairs), difference, low, high, mcnemar(len(only_a), len(only_b)), only_a, only_b)


def newcombe(both: int, only_first: int, only_second: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a difference of paired shares.

    Method 10 of Newcombe 1998 (Statistics in Medicine 17:2635): it combines Wilson's intervals of the two shares
    with their correlation.

    Args:
        both: pairs in which both succeed.
        only_first: pairs in which only the first succeeds.
        only_second: pairs in which only the second succeeds.
        n: number of pairs.
    """
    first, second = Rate.of(both + only_first, n), Rate.of(both + only_second, n)
    neither = n - both - only_first - only_second
    sizes = (both + only_first) * (neither + only_second) * (both + only_second) * (neither + only_first)
    excess = float(both * neither - only_first * only_second)
    if excess > 0:
        excess = max(excess - n / 2, 0.0)
    correlation = excess / math.sqrt(sizes) if sizes else 0.0

    def reach(down: float, up: float) -> float:
        return math.sqrt(max(down * down - 2 * correlation * down * up + up * up, 0.0))

    difference = first.value - second.value
    low = difference - reach(first.value - first.low, second.high - second.value)
    high = difference + reach(first.high - first.value, second.value - second.low)
    return max(low, -1.0), min(high, 1.0)


def mcnemar(one: int, other: int) -> float:
    """Return the p value of McNemar's exact two-sided test, from the two counts of discordant pairs."""
    from scipy.stats import binomtest

    return float(binomtest(one, one + other).pvalue) if one + other else 1.0
