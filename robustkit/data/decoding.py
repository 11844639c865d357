"""Encoded images (JPEG, PNG …) as tensors of one size, decoded by Pillow when they are used."""

from __future__ import annotations

import hashlib
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import BinaryIO, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError

from robustkit.core.errors import UsageError, did_you_mean
from robustkit.core.flags import Flag
from robustkit.core.preprocess import Preprocess
from robustkit.data.sources.folder_listing import FORMATS

T = TypeVar("T")
# The most pixels of an image: Pillow's own limit, 256 MiB as RGB. The most bytes of a file.
MAX_PIXELS = 1024**3 // 4 // 3
MAX_BYTES = 256 << 20
# The most threads that read and decode a block, and the images that a fingerprint reads at once.
_THREADS = 8
_CHUNK = 256
_ORIENTATION = 274
# Pillow applies the EXIF rotation of TIFF images when it reads them.
_TURNED = ("TIFF",)


class EncodedImages(ABC):
    """A `Source` of encoded images, decoded to RGB.

    Attributes:
        preprocess: how to bring images to one size; None leaves them, and refuses unequal ones.
    """

    preprocess: Preprocess | None
    slow: ClassVar[bool] = True

    @abstractmethod
    def encoded(self, row: int) -> bytes:
        """Return the image's file, undecoded; OSError or UsageError if it cannot be read."""

    @abstractmethod
    def title(self, row: int) -> str:
        """Return the name of that image in errors."""

    def content(self, rows: npt.NDArray[np.int64]) -> Iterator[bytes]:
        """Yield the preprocessing and the hash of each image file, without decoding."""
        yield repr(self.preprocess).encode()
        for start in range(0, len(rows), _CHUNK):
            yield from self._each(self._digest, rows[start : start + _CHUNK])

    def flags(self, rows: npt.NDArray[np.int64]) -> tuple[Flag, ...]:
        """Return a flag if some of these images have an EXIF rotation, which is not applied."""
        turned = np.concatenate(
            [
                np.asarray(list(self._each(self._is_turned, rows[start : start + _CHUNK])), dtype=bool)
                for start in range(0, len(rows), _CHUNK)
            ]
        )
        if not turned.any():
            return ()
        first = self.title(int(rows[turned.argmax()]))
        return (
            Flag(
                "exif-rotation",
                "warning",
                int(turned.sum()),
                f"of {len(rows)} pictures carry an EXIF rotation, the first is {first}: it is not applied, as in "
                "the transforms of torchvision and timm",
                "rotate the files themselves if the model needs upright images",
            ),
        )

    def read(self, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        """Return those images, float32 (B, 3, H, W), contiguous, newly allocated.

        Raises:
            UsageError: a file is not a readable 8-bit image, or has another size than the rest.
        """
        pixels = list(self._each(self._pixels, rows))
        if not pixels:
            return torch.empty(0, 3, *self._size)
        raw = torch.from_numpy(np.stack(pixels))
        return (raw.to(torch.float32) / 255).permute(0, 3, 1, 2).contiguous()

    def enlargement(self, row: int) -> float:
        """Return by which factor an image is enlarged when it is read; this reads only its header."""
        if self.preprocess is None:
            return 1.0
        with self._opened(row) as image:
            width, height = int(image.width), int(image.height)
        tall, _ = _resized(height, width, self.preprocess)
        return tall / height

    def _each(self, work: Callable[[int], T], rows: npt.NDArray[np.int64]) -> Iterator[T]:
        """Yield a function's result for each row, from threads: reading, hashing and decoding release the GIL."""
        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
            yield from pool.map(work, rows.tolist())

    def _bytes(self, row: int) -> bytes:
        try:
            return self.encoded(row)
        except OSError as error:
            raise unreadable(self.title(row), error.strerror or error) from error

    def _digest(self, row: int) -> bytes:
        return hashlib.sha256(self._bytes(row)).digest()

    def _is_turned(self, row: int) -> bool:
        try:
            with self._opened(row) as image:
                if image.format in _TURNED or "exif" not in image.info:
                    return False
                return image.getexif().get(_ORIENTATION) in range(2, 9)
        # A damaged image raises its error when it is decoded.
        except Exception:
            return False

    def _opened(self, row: int) -> Image.Image:
        """Open an image of a documented format, by its header alone."""
        try:
            image = Image.open(io.BytesIO(self._bytes(row)), formats=FORMATS)
        except UnidentifiedImageError as error:
            raise unreadable(self.title(row), f"it is none of {', '.join(FORMATS)}") from error
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise self._too_large(row) from error
        if image.width * image.height > MAX_PIXELS:
            raise self._too_large(row)
        return image

    def _too_large(self, row: int) -> UsageError:
        return UsageError(f"{self.title(row)} has more than {MAX_PIXELS:,} pixels; make it smaller or remove it.")

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
            with self._opened(row) as image:
                mode = image.mode
                # Pillow warns if a palette with transparency is converted to RGB directly.
                rgb: Image.Image = (image.convert("RGBA") if "transparency" in image.info else image).convert(
                    "RGB"
                )
        except UsageError:
            raise
        # Pillow raises many types of errors for damaged or hostile files.
        except Exception as error:
            raise unreadable(self.title(row), error) from error
        if mode.startswith(("I", "F")):
            raise UsageError(
                f"{self.title(row)} has more than 8 bits per pixel (mode {mode}); write it as an 8-bit image."
            )
        return rgb


def read_limited(file: BinaryIO, size: int) -> bytes:
    """Return that many bytes of a file; OSError if there are more than an image may have."""
    if size > MAX_BYTES:
        raise OSError(None, f"it has {size:,} bytes, more than the {MAX_BYTES:,} that are read")
    return file.read(size)


def unreadable(title: str, reason: object) -> UsageError:
    """Return the error for an image that is damaged or missing."""
    return UsageError(f"{title} cannot be read as an image ({reason}); replace it or remove it.")


def check_interpolation(preprocess: Preprocess | None) -> None:
    """Refuse a resampling filter that torchvision does not have."""
    from torchvision.transforms import InterpolationMode

    known = [mode.value for mode in InterpolationMode]
    if preprocess is not None and preprocess.interpolation not in known:
        raise did_you_mean("interpolation", preprocess.interpolation, known)


def _fit(image: Image.Image, preprocess: Preprocess) -> Image.Image:
    """Resize and crop the centre; for square crops the result equals torchvision's."""
    from torchvision.transforms import functional

    sides = _resized(image.height, image.width, preprocess)
    if sides != (image.height, image.width):
        mode = functional.InterpolationMode(preprocess.interpolation)
        image = functional.resize(image, list(sides), interpolation=mode)
    cropped: Image.Image = functional.center_crop(image, list(preprocess.size))
    return cropped


def _resized(height: int, width: int, preprocess: Preprocess) -> tuple[int, int]:
    """Return height and width of an image after resizing, as torchvision does but at least those of the crop."""
    if preprocess.resize is None:
        return height, width
    tall, wide = preprocess.size
    short = max(preprocess.resize, -(-tall * min(height, width) // height), -(-wide * min(height, width) // width))
    if height <= width:
        return short, max(short * width // height, wide)
    return max(short * height // width, tall), short
