"""The flag of a clean accuracy that is not above chance."""

from __future__ import annotations

import pytest

from robustkit.checks.chance import chance_accuracy

EVEN = [number % 10 for number in range(200)]
UNEVEN = [0] * 180 + list(range(1, 10)) * 2


@pytest.mark.parametrize(
    ("correct", "labels", "classes", "flagged"),
    [
        (190, EVEN, 10, False),
        (60, EVEN, 10, False),
        (25, EVEN, 10, True),
        (20, EVEN, 10, True),
        (0, EVEN, 10, True),
        (25, EVEN, 1000, False),
        # As many as one gets by the most frequent label alone.
        (180, UNEVEN, 10, True),
        (195, UNEVEN, 10, False),
        # All right: no sign of a fault, however few.
        (3, [0, 1, 0], 2, False),
        (4, [0, 0, 0, 0], 2, False),
        # One class alone: guessing gets one in K of it.
        (90, [3] * 100, 10, False),
        (10, [3] * 100, 10, True),
        (0, [0, 1, 0], 2, True),
        (5, [0, 0, 0, 1, 2, 3, 4, 5], 10, False),
    ],
)
def test_chance_is_a_class_in_k_or_the_most_frequent_label(
    correct: int, labels: list[int], classes: int, flagged: bool
) -> None:
    flag = chance_accuracy(correct, labels, classes)
    assert (flag is not None) == flagged
    if flag is not None:
        assert flag.code == "chance-accuracy"
        assert ("every image is misclassified" in flag.meaning) == (correct == 0)
        assert all(cause in flag.remedy for cause in ("labels", "normalisation", "pixels"))
