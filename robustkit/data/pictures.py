"""Encoded images (JPEG, PNG …) as tensors of one size: decoded by Pillow, and only when they are asked for."""

from __future__ import annotations

import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError

from robustkit.errors import UsageError, did_you_mean
from robustkit.preprocess import Preprocess

# What Pillow's decoders raise on a damaged or hostile file.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
# The most threads that decode a block.
_THREADS = 8


class Pictures(ABC):
    """A `Source` of encoded images, decoded to RGB.

    Attributes:
        preprocess: how to bring images to one size; None leaves them, and refuses unequal ones.
    """

    preprocess: Preprocess | None
    slow: ClassVar[bool] = True

    @abstractmethod
    def encoded(self, row: int) -> Path | BinaryIO:
        """Return where the bytes of that image are."""

    @abstractmethod
    def title(self, row: int) -> str:
        """Return what errors call that image."""

    @abstractmethod
    def content(self, rows: npt.NDArray[np.int64]) -> Iterator[bytes]:
        """Yield whatever determines those images, for the fingerprint; none is decoded for it."""

    def read(self, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        """Return those images, float32 (B, 3, H, W), contiguous, newly allocated.

        Raises:
            UsageError: a file is not a readable 8-bit image, or has another size than the rest.
        """
        # Pillow decodes and resizes outside Python's lock.
        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
            pixels = list(pool.map(self._pixels, rows.tolist()))
        if not pixels:
            return torch.empty(0, 3, *self._size)
        raw = torch.from_numpy(np.stack(pixels))
        return (raw.to(torch.float32) / 255).permute(0, 3, 1, 2).contiguous()

    def enlargement(self, row: int) -> float:
        """Return how many times as long the sides of an image become when it is read; of it only the header is."""
        if self.preprocess is None:
            return 1.0
        try:
            with Image.open(self.encoded(row)) as image:
                width, height = int(image.width), int(image.height)
        except _DAMAGE as error:
            raise unreadable(self.title(row), error) from error
        tall, _ = _resized(height, width, self.preprocess)
        return tall / height

    @cached_property
    def _size(self) -> tuple[int, int]:
        """(height, width) of every image; without preprocessing that of the first."""
        if self.preprocess is not None:
            return self.preprocess.size
        width, height = self._decode(0).size
        return height, width

    def _pixels(self, row: int) -> npt.NDArray[np.uint8]:
        """Return one image, uint8 (H, W, 3)."""
        image = self._decode(row)
        if self.preprocess is not None:
            image = _fit(image, self.preprocess)
        elif (image.height, image.width) != self._size:
            height, width = self._size
            raise UsageError(
                f"{self.title(row)} is {image.height} x {image.width} pixels, "
                f"other images are {height} x {width}; "
                "write a model with a known input size, or add ?size=N to the model."
            )
        return np.asarray(image)

    def _decode(self, row: int) -> Image.Image:
        """Read an image of any colour mode as RGB."""
        try:
            with Image.open(self.encoded(row)) as image:
                mode = image.mode
                # Pillow warns when transparency of a palette goes straight to RGB.
                rgb: Image.Image = (image.convert("RGBA") if "transparency" in image.info else image).convert(
                    "RGB"
                )
        except UnidentifiedImageError as error:
            raise unreadable(self.title(row), "its format is unknown") from error
        except _DAMAGE as error:
            raise unreadable(self.title(row), error) from error
        if mode.startswith(("I", "F")):
            raise UsageError(
                f"{self.title(row)} has more than 8 bits per pixel (mode {mode}); write it as an 8-bit image."
            )
        return rgb


def unreadable(title: str, reason: object) -> UsageError:
    """Return the error for an image that is damaged or gone."""
    return UsageError(f"{title} cannot be read as an image ({reason}); replace it or remove it.")


def check_interpolation(preprocess: Preprocess | None) -> None:
    """Refuse a resampling filter that torchvision has not."""
    from torchvision.transforms import InterpolationMode

    known = [mode.value for mode in InterpolationMode]
    if preprocess is not None and preprocess.interpolation not in known:
        raise did_you_mean("interpolation", preprocess.interpolation, known)


def _fit(image: Image.Image, preprocess: Preprocess) -> Image.Image:
    """Resize and crop the centre, to the pixel as torchvision does where the crop is a square."""
    from torchvision.transforms import functional

    sides = _resized(image.height, image.width, preprocess)
    if sides != (image.height, image.width):
        mode = functional.InterpolationMode(preprocess.interpolation)
        image = functional.resize(image, list(sides), interpolation=mode)
    cropped: Image.Image = functional.center_crop(image, list(preprocess.size))
    return cropped


def _resized(height: int, width: int, preprocess: Preprocess) -> tuple[int, int]:
    """Return height and width of an image after resizing: as torchvision has it, but never less than the crop."""
    if preprocess.resize is None:
        return height, width
    tall, wide = preprocess.size
    short = max(preprocess.resize, -(-tall * min(height, width) // height), -(-wide * min(height, width) // width))
    if height <= width:
        return short, max(short * width // height, wide)
    return max(short * height // width, tall), short
