"""Whether the labels number the model's classes in another order. No torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from robustkit.checks.chance import chance_accuracy
from robustkit.core.flags import Flag

# The chance that a model whose classes are the labels is flagged.
LEVEL = 1e-4
# An assignment of more classes takes minutes, and data sets rarely have enough images of each.
MAX_CLASSES = 2_000
_NAMED = 3


def label_checks(predictions: Sequence[int], labels: Sequence[int], classes: int, model: str = "") -> list[Flag]:
    """Return the flags of a model's predictions on clean images: it guesses, or its class numbers differ.

    Args:
        predictions: its predictions (N), -1 where its logits are not finite.
        labels: of the same images (N).
        classes: K.
        model: what to call the model where there are several.
    """
    correct = sum(prediction == label for prediction, label in zip(predictions, labels, strict=True))
    flags = (chance_accuracy(correct, labels, classes, model), relabelled(predictions, labels, model))
    return [flag for flag in flags if flag is not None]


def relabelled(predictions: Sequence[int], labels: Sequence[int], model: str = "") -> Flag | None:
    """Return a flag if other numbers for the labels make significantly more of the predictions right.

    The numbers are a one-to-one assignment of labels to predicted classes. It is fitted on one half of the images
    and tested on the other, so that overfitting does not count.

    Args:
        predictions: the model's predictions (N), -1 where its logits are not finite.
        labels: of the same images (N).
        model: what to call the model where there are several.
    """
    predicted, labelled = np.asarray(predictions, np.int64), np.asarray(labels, np.int64)
    predicted, labelled = predicted[predicted >= 0], labelled[predicted >= 0]
    classes, indices = np.unique(np.concatenate([labelled, predicted]), return_inverse=True)
    if np.array_equal(predicted, labelled) or len(classes) > MAX_CLASSES:
        return None
    rows, columns = indices[: len(labelled)], indices[len(labelled) :]
    # Every second image of each label, for any order of the labels.
    half = np.argsort(np.argsort(rows, kind="stable")) % 2 == 0
    renamed = np.empty_like(rows)
    for fitted in (half, ~half):
        renamed[~fitted] = _assignment(rows[fitted], columns[fitted], len(classes))[rows[~fitted]]
    gained = int(((renamed == columns) & (rows != columns)).sum())
    lost = int(((renamed != columns) & (rows == columns)).sum())
    if gained <= lost:
        return None
    # Takes a while to import.
    from scipy.special import bdtrc

    # A sign test: if the labels were right, more would be lost than gained.
    if bdtrc(gained - 1, gained + lost, 0.5) >= LEVEL:
        return None
    best = _assignment(rows, columns, len(classes))
    moved = [f"{classes[row]} is {classes[best[row]]}" for row in np.unique(rows) if best[row] != row]
    more = f" and {len(moved) - _NAMED} more" if len(moved) > _NAMED else ""
    suffix = f" of {model}" if model else ""
    return Flag(
        "labels-renumbered",
        "warning",
        round(float((renamed == columns).mean()), 4),
        f"would be the clean accuracy{suffix} if the labels had other numbers (label {', '.join(moved[:_NAMED])}"
        f"{more}), against {(rows == columns).mean():.4g} with those given",
        "give the labels the model's own class numbers, with ?classes=FILE after the data",
    )


def _assignment(rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """Return a class for each label, so that most predictions are right; the label itself if none is."""
    table = np.zeros((count, count))
    np.add.at(table, (rows, columns), 1)
    # Of equally good assignments the one that changes fewer labels.
    table[np.diag_indices(count)] += 0.5 / count
    own = table.diagonal()
    # Summed over any assignment, the right side is what the labels themselves reach.
    if (table <= (own[:, None] + own) / 2).all():
        return np.arange(count)
    # Takes a while to import.
    from scipy.optimize import linear_sum_assignment

    assigned: npt.NDArray[np.int64] = linear_sum_assignment(table, maximize=True)[1]
    return assigned
