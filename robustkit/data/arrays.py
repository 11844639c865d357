"""Samples whose images stand in one array, in memory or memory-mapped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from robustkit.data.samples import Samples
from robustkit.errors import UsageError

# Channel counts that are taken at their word, however small the image.
_USUAL_CHANNELS = 4
_CHUNK = 256


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Images of one array: uint8 in [0, 255], or floats.

    Attributes:
        array: (N, H, W, C) if channels_last, else (N, C, H, W).
        channels_last: where the channels stand.
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


def from_arrays(
    images: torch.Tensor | npt.NDArray[Any],
    labels: torch.Tensor | npt.NDArray[Any] | Sequence[int],
    name: str = "python:arrays",
) -> Samples:
    """Return samples that read from arrays already in memory, without copying them.

    Args:
        images: floats (N, C, H, W) in [0, 1], or uint8. A uint8 tensor is (N, C, H, W); a uint8 numpy array
            is (N, H, W, C) when its last axis is 1, 3 or 4 long, otherwise (N, C, H, W).
        labels: integers (N,), not negative.
        name: what errors and records call these samples.

    Raises:
        UsageError: the arrays do not fit this description. Values outside [0, 1] are found when read.
    """
    if isinstance(images, torch.Tensor):
        tensor = images.detach().cpu()
        # numpy has no bfloat16
        array = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        channels_last = False
    else:
        array = np.asarray(images)
        channels_last = array.dtype == np.uint8 and array.ndim == 4 and array.shape[3] in (1, 3, 4)
    numbers = labels.detach().cpu().numpy() if isinstance(labels, torch.Tensor) else np.asarray(labels)
    return array_samples(array, numbers, name, channels_last=channels_last)


def array_samples(
    images: npt.NDArray[Any],
    labels: npt.NDArray[Any],
    name: str,
    *,
    channels_last: bool,
    classes: tuple[str, ...] | None = None,
) -> Samples:
    """Check the form of images and labels, without reading the images, and return them as samples.

    Raises:
        UsageError: wrong type, shape or length, or a label that is no class.
    """
    _check_images(images, name, channels_last)
    _check_labels(labels, name, len(images))
    numbers = labels.astype(np.int64)
    _check_classes(numbers, name, classes)
    return Samples(
        name, numbers, classes, ArraySource(images, channels_last), np.arange(len(images), dtype=np.int64)
    )


def _check_images(images: npt.NDArray[Any], name: str, channels_last: bool) -> None:
    shape = images.shape
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        raise UsageError(f"{name}: the images x are {images.dtype}; write uint8 in [0, 255], or floats in [0, 1].")
    if images.ndim != 4:
        hint = "; a channel axis is missing" if images.ndim == 3 else ""
        raise UsageError(
            f"{name}: the images x have shape {shape}{hint}; "
            "write four axes, (N, H, W, C) for uint8 or (N, C, H, W) for floats."
        )
    if 0 in shape:
        raise UsageError(f"{name}: the images x have shape {shape}, which holds no pixel; write at least one.")
    channels, height, width = (shape[3], *shape[1:3]) if channels_last else shape[1:]
    if channels > _USUAL_CHANNELS and channels > min(height, width):
        order, axes = ("(N, H, W, C)", (0, 2, 3, 1)) if channels_last else ("(N, C, H, W)", (0, 3, 1, 2))
        raise UsageError(
            f"{name}: the {images.dtype} images x have shape {shape}, "
            f"which read as {order} means {channels} channels of {height} x {width} pixels; "
            f"write x.transpose{axes} if the channels stand elsewhere."
        )


def _check_labels(labels: npt.NDArray[Any], name: str, count: int) -> None:
    if labels.dtype.kind not in "iu":
        raise UsageError(f"{name}: the labels y are {labels.dtype}; write integers, as y.astype('int64').")
    if labels.ndim != 1:
        raise UsageError(
            f"{name}: the labels y have shape {labels.shape}; write one integer per image, shape ({count},)."
        )
    if len(labels) != count:
        raise UsageError(f"{name}: {count} images x but {len(labels)} labels y; write one label per image.")


def _check_classes(labels: npt.NDArray[np.int64], name: str, classes: tuple[str, ...] | None) -> None:
    if labels.min() < 0:
        position = int(labels.argmin())
        raise UsageError(
            f"{name}: the label at position {position} is {labels[position]}; write classes from 0 up."
        )
    if classes is not None and labels.max() >= len(classes):
        position = int(labels.argmax())
        raise UsageError(
            f"{name}: the label at position {position} is {labels[position]}, but there are {len(classes)} "
            f"class names; write labels from 0 to {len(classes) - 1}, or more names."
        )
