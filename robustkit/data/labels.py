"""Labels in various forms, converted to integers from 0."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from robustkit.core.errors import UsageError
from robustkit.data.sources.tensors import as_array

_MAX_CLASSES = 2**31


def class_numbers(
    labels: Any, name: str, count: int, classes: tuple[str, ...] | None = None
) -> tuple[npt.NDArray[np.int64], tuple[str, ...] | None]:
    """Return labels as integers (N,), and the names of the classes if there are any.

    Args:
        labels: a tensor, an array or a list of N whole numbers of any type, of shape (N,) or (N, 1); of N one-hot
            rows (N, K); or of N names of classes.
        name: name of the data in errors.
        count: N, the number of images.
        classes: the names of the classes, in the order of their numbers. Without them names are numbered as they
            sort, as those of class folders are.

    Raises:
        UsageError: labels of another form, another number of them, or one that is no class.
    """
    given = _array(labels, name)
    check_count(given.shape, name, count)
    if given.ndim == 2 and given.shape[1] == 1:
        given = given[:, 0]
    if given.dtype.kind in "US":
        return _named(given, name, classes)
    if given.dtype.kind not in "biuf":
        raise UsageError(f"{name}: the labels y are {given.dtype}; write integers, as y.astype('int64').")
    if given.ndim == 2:
        given = _from_one_hot(given, name)
    if given.ndim != 1:
        raise UsageError(
            f"{name}: the labels y have shape {given.shape}; write one integer per image, shape ({count},)."
        )
    if given.dtype.kind == "f" and len(broken := np.flatnonzero(given != np.floor(given))):
        raise UsageError(
            f"{name}: the label at position {broken[0]} is {given[broken[0]]:g}; write whole numbers from 0 up."
        )
    for bad, advice in (
        (given < 0, "classes from 0 up"),
        (given >= _MAX_CLASSES, f"classes below {_MAX_CLASSES:,}"),
    ):
        if bad.any():
            row = int(bad.argmax())
            raise UsageError(f"{name}: the label at position {row} is {given[row]:g}; write {advice}.")
    numbers = given.astype(np.int64)
    if classes is not None and numbers.max() >= len(classes):
        row = int(numbers.argmax())
        raise UsageError(
            f"{name}: the label at position {row} is {numbers[row]}, but there are {len(classes)} "
            f"class names; write labels from 0 to {len(classes) - 1}, or more names."
        )
    return numbers, classes


def check_count(shape: tuple[int, ...], name: str, count: int) -> None:
    """Refuse labels of a shape that is not one label, or one row, for each of `count` images.

    Raises:
        UsageError: there are more or fewer.
    """
    if not shape:
        raise UsageError(f"{name}: the labels y have shape (); write one integer per image, shape ({count},).")
    if shape[0] != count:
        raise UsageError(f"{name}: {count} images x but {shape[0]} labels y; write one label per image.")


def _array(labels: Any, name: str) -> npt.NDArray[Any]:
    if isinstance(labels, torch.Tensor):
        return as_array(labels, name)
    if isinstance(labels, list | tuple) and any(isinstance(one, torch.Tensor) for one in labels):
        labels = [as_array(one, name).tolist() if isinstance(one, torch.Tensor) else one for one in labels]
    try:
        given = np.asarray(labels)
    except ValueError as error:
        raise UsageError(
            f"{name}: the labels y are rows of unequal lengths; write one label per image."
        ) from error
    # A column of a data frame has its numbers or names as objects.
    if given.dtype == object and given.ndim == 1:
        given = np.asarray(given.tolist()) if all(map(_is_plain, given)) else given
    return given


def _is_plain(label: object) -> bool:
    return isinstance(label, str | int | float | np.integer | np.floating)


def _named(
    given: npt.NDArray[Any], name: str, classes: tuple[str, ...] | None
) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    if given.ndim != 1:
        raise UsageError(f"{name}: the labels y have shape {given.shape}; write one name of a class per image.")
    texts = [one.decode(errors="replace") if isinstance(one, bytes) else str(one) for one in given]
    order = classes if classes is not None else tuple(sorted(set(texts)))
    places = {text: number for number, text in enumerate(order)}
    for row, text in enumerate(texts):
        if text not in places:
            raise UsageError(
                f"{name}: the label at position {row} is {text!r}, which is none of the {len(order)} class names; "
                "write one of them, or add it."
            )
    return np.array([places[text] for text in texts], np.int64), order


def _from_one_hot(rows: npt.NDArray[Any], name: str) -> npt.NDArray[np.int64]:
    hot = rows == 1
    bad = (hot.sum(1) != 1) | (~hot & (rows != 0)).any(1)
    if bad.any():
        raise UsageError(
            f"{name}: the labels y have shape {rows.shape}, but row {int(bad.argmax())} is not one-hot; write one "
            "integer per image, or rows of one 1 and zeros."
        )
    numbers: npt.NDArray[np.int64] = hot.argmax(1)
    return numbers
