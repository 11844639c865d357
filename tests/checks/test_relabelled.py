"""The flag of labels that are the model's classes under other numbers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from robustkit.checks.relabelled import _assignment, label_checks, relabelled

CLASSES = 10
TRUE = np.arange(200) % CLASSES
# Nine of ten right, the rest spread over the classes.
SAID = np.where(np.arange(200) % 9 == 8, (TRUE + np.arange(200)) % CLASSES, TRUE)
SHIFTED = np.roll(np.arange(CLASSES), 1)
EXCHANGED = np.array([0, 1, 2, 5, 4, 3, 6, 7, 8, 9])


@pytest.mark.parametrize(
    ("order", "chance"),
    [(SHIFTED, True), (EXCHANGED, False), (np.array([0, 9, 8, 7, 6, 5, 4, 3, 2, 1]), False)],
    ids=["shifted", "two exchanged", "some exchanged"],
)
def test_permuted_labels_are_found(order: np.ndarray, chance: bool) -> None:
    flags = {flag.code: flag for flag in label_checks(SAID.tolist(), order[TRUE].tolist(), CLASSES)}
    assert ("chance-accuracy" in flags) == chance
    assert flags["labels-renumbered"].value == pytest.approx((SAID == TRUE).mean(), abs=1e-4)
    assert "(label 3 is 5, 5 is 3)" in flags["labels-renumbered"].meaning or order is not EXCHANGED


@pytest.mark.parametrize(
    "predicted",
    [
        SAID,
        TRUE,
        np.zeros(200),
        np.full(200, -1),
        np.random.RandomState(0).randint(CLASSES, size=200),
        # Most cats taken for dogs: weak, but no other numbers.
        np.where((TRUE == 3) & (np.arange(200) % 40 < 30), 5, TRUE),
    ],
    ids=["good", "perfect", "constant", "not finite", "guessed", "confused"],
)
def test_a_weak_model_is_not_reported_as_permuted_labels(predicted: np.ndarray) -> None:
    assert relabelled(predicted.tolist(), TRUE.tolist()) is None


def test_the_assignment_maximises_the_predictions_that_are_right() -> None:
    generator = np.random.default_rng(0)
    for _ in range(100):
        count, right = int(generator.integers(2, 6)), generator.random()
        rows = generator.integers(0, count, 40)
        columns = np.where(generator.random(40) < right, rows, generator.integers(0, count, 40))
        table = np.zeros((count, count))
        np.add.at(table, (rows, columns), 1)
        table[np.diag_indices(count)] += 0.5 / count
        best = linear_sum_assignment(table, maximize=True)[1]
        assert table[range(count), _assignment(rows, columns, count)].sum() == table[range(count), best].sum()
