"""Samples whose images are one array, in memory or memory-mapped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from robustkit.core.errors import UsageError, error_summary
from robustkit.core.flags import Flag
from robustkit.data.labels import class_numbers
from robustkit.data.samples import Samples
from robustkit.data.sources.layout import channels_last
from robustkit.data.sources.tensors import as_array

_CHUNK = 256


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Images of one array: uint8 in [0, 255], or floats.

    Attributes:
        array: (N, H, W, C) if channels_last, else (N, C, H, W).
        channels_last: whether the channels are the last axis.
    """

    array: npt.NDArray[Any]
    channels_last: bool
    slow: ClassVar[bool] = False

    def read(self, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        """Return those images, float32 (B, C, H, W), contiguous, newly allocated."""
        raw = np.asarray(self.array[rows])
        if raw.dtype == np.uint8:
            x = torch.from_numpy(raw).to(torch.float32) / 255
        else:
            x = torch.from_numpy(raw.astype(np.float32))
        # `contiguous()` would leave the strides of a single channel as they are.
        return (x.permute(0, 3, 1, 2) if self.channels_last else x).clone(memory_format=torch.contiguous_format)

    def content(self, rows: npt.NDArray[np.int64]) -> Iterator[bytes]:
        """Yield the raw bytes of those images, and how to read them."""
        yield f"{self.array.dtype.str} {self.array.shape[1:]} {self.channels_last}".encode()
        for start in range(0, len(rows), _CHUNK):
            yield self.array[rows[start : start + _CHUNK]].tobytes()

    def flags(self, rows: npt.NDArray[np.int64]) -> tuple[Flag, ...]:
        """Return nothing: arrays have no files."""
        return ()


def from_arrays(
    images: torch.Tensor | npt.NDArray[Any],
    labels: Any,
    name: str = "python:arrays",
    *,
    layout: str | None = None,
    classes: tuple[str, ...] | None = None,
    by_name: bool = False,
) -> Samples:
    """Return samples that read from arrays already in memory, without copying them.

    Args:
        images: floats (N, C, H, W) in [0, 1], or uint8. A uint8 tensor is (N, C, H, W); a uint8 numpy array
            is (N, H, W, C) when its last axis is 1, 3 or 4 long, otherwise (N, C, H, W). Any of them may have the
            other layout if its shape is not ambiguous (`layout.channels_last`).
        labels: see `class_numbers`: integers (N,), one-hot rows (N, K), or names of classes.
        name: name of these samples in errors and records.
        layout: `NCHW` or `NHWC`, to override the above.
        classes: the names of the classes, in the order of their numbers.
        by_name: whether the numbers are positions in the sorted names, as those of class folders are.

    Returns:
        The samples; images are float32 (B, C, H, W) in [0, 1] when they are read.

    Raises:
        UsageError: the arrays do not fit this description. Values outside [0, 1] raise when they are read.

    Example:
        >>> samples = from_arrays(np.zeros((5, 28, 28, 3), np.uint8), [0, 1, 2, 1, 0])
        >>> len(samples), samples.num_classes, samples.images([0, 4]).shape
        (5, 3, torch.Size([2, 3, 28, 28]))
    """
    array = _as_array(images, name)
    of_bytes = not isinstance(images, torch.Tensor) and array.dtype == np.uint8 and array.ndim == 4
    usual = of_bytes and array.shape[3] in (1, 3, 4)
    check_form(array.shape, array.dtype, name)
    what = f"{name}: the {array.dtype} images x"
    last = channels_last(array.shape, layout, usual, what, "robustkit.data.from_arrays(x, y, layout='{}')")
    return array_samples(array, labels, name, channels_last=last, classes=classes, by_name=by_name)


def _as_array(images: Any, name: str) -> npt.NDArray[Any]:
    if isinstance(images, torch.Tensor):
        return as_array(images, name)
    try:
        return np.asarray(images)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"{name}: the images x are no array ({error_summary(error)}); write a tensor or an array."
        ) from error


def array_samples(
    images: npt.NDArray[Any],
    labels: Any,
    name: str,
    *,
    channels_last: bool,
    classes: tuple[str, ...] | None = None,
    by_name: bool = False,
) -> Samples:
    """Check labels and return them with the images, none of which is read, as samples.

    Raises:
        UsageError: wrong type, shape or number of labels, or one that is no class.
    """
    numbers, names = class_numbers(labels, name, len(images), classes)
    # Names without an order are numbered as they sort.
    by_name = by_name or (names is not None and classes is None)
    rows = np.arange(len(images), dtype=np.int64)
    return Samples(name, numbers, names, ArraySource(images, channels_last), rows, by_name=by_name)


def check_form(shape: tuple[int, ...], dtype: np.dtype[Any], name: str) -> None:
    """Refuse images of another type or with other axes, by the header of their array.

    Raises:
        UsageError: they are not numbers, do not have four axes, or have no pixel.
    """
    if dtype != np.uint8 and dtype.kind != "f":
        raise UsageError(f"{name}: the images x are {dtype}; write uint8 in [0, 255], or floats in [0, 1].")
    if len(shape) != 4:
        hint = "; a channel axis is missing" if len(shape) == 3 else ""
        raise UsageError(
            f"{name}: the images x have shape {shape}{hint}; "
            "write four axes, (N, H, W, C) for uint8 or (N, C, H, W) for floats."
        )
    if 0 in shape:
        raise UsageError(f"{name}: the images x have shape {shape}, which holds no pixel; write at least one.")
