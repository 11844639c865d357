"""Compare two searches for minimum norms on the same images: the paired difference of their distances."""

from __future__ import annotations

import math
from dataclasses import dataclass

from robustkit.core.errors import UsageError
from robustkit.reporting.paired import mcnemar
from robustkit.runs.distances import Middle
from robustkit.runs.evaluation_record import Report

METHOD = "median of the paired differences; its interval by order statistics"


@dataclass(frozen=True)
class DistanceComparison:
    """The paired comparison of the distances of two runs, A and B.

    Attributes:
        n: images that at least one of the two models classifies correctly.
        difference: the median of A's distance minus B's, with its 95 % interval.
        farther_a: number of images whose adversarial image is farther away in A.
        farther_b: likewise in B.
        p: of the exact two-sided sign test.
    """

    n: int
    difference: Middle
    farther_a: int
    farther_b: int
    p: float

    @property
    def equal(self) -> int:
        """Number of images whose distances are equal in both."""
        return self.n - self.farther_a - self.farther_b


def compare_distances(a: Report, b: Report) -> DistanceComparison:
    """Return the comparison of two runs on the images that both have; their data must be the same.

    Raises:
        UsageError: if a run did not search for minimum norms, the norms differ, or no image is left to compare.
    """
    if a.minimum is None or b.minimum is None or a.spec.threat != b.spec.threat:
        raise UsageError(
            f"the runs have threats {a.spec.threat} and {b.spec.threat}, whose numbers cannot be compared; "
            f"evaluate both models under the same threat."
        )
    others = _distances(b)
    pairs = [(distance, others[index]) for index, distance in _distances(a).items() if index in others]
    differences = sorted(_difference(*pair) for pair in pairs if max(pair) > 0)
    if not differences:
        raise UsageError("the two runs have no image in common that a model classifies correctly.")
    farther, nearer = sum(one > 0 for one in differences), sum(one < 0 for one in differences)
    return DistanceComparison(len(differences), Middle.of(differences), farther, nearer, mcnemar(farther, nearer))


def _distances(report: Report) -> dict[int, float]:
    distances = report.minimum.distances if report.minimum else []
    pairs = zip(report.verdicts, distances, strict=True)
    return {verdict.index: math.inf if distance is None else distance for verdict, distance in pairs}


def _difference(a: float, b: float) -> float:
    """Return a minus b, 0 where both are infinite."""
    return 0.0 if a == b else a - b
