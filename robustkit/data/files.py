"""Samples of image files in one folder per class, each decoded when it is asked for."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from robustkit.data.samples import Samples
from robustkit.errors import UsageError, did_you_mean
from robustkit.preprocess import Preprocess

# What Pillow's decoders raise on a damaged or hostile file.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def image_folder(path: Path, name: str, preprocess: Preprocess | None) -> Samples:
    """Return the images below a folder as torchvision's ImageFolder labels them.

    The listing is sorted by class; a fixed shuffle makes the first n a random sample.

    Args:
        path: the folder that holds one folder per class.
        name: what errors and records call these samples.
        preprocess: how to bring images to one size; without it they must have one.

    Raises:
        UsageError: there is no such folder, or it holds no class folders with images.
    """
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import InterpolationMode

    known = [mode.value for mode in InterpolationMode]
    if preprocess is not None and preprocess.interpolation not in known:
        raise did_you_mean("interpolation", preprocess.interpolation, known)
    if not path.is_dir():
        what = "a file" if path.exists() else "not there"
        raise UsageError(f"{path} is {what}; write folder:PATH with a folder that holds one folder per class.")
    try:
        listing = ImageFolder(str(path))
    except OSError as error:
        reason = str(error).split(". Supported")[0]
        raise UsageError(f"{path} is not one folder of images per class: {reason.rstrip('.')}.") from error
    order = np.random.RandomState(0).permutation(len(listing.samples))
    files = tuple(listing.samples[row][0].removeprefix(f"{path}{os.sep}") for row in order)
    labels = np.asarray(listing.targets, dtype=np.int64)[order]
    source = FileSource(path, files, preprocess)
    return Samples(name, labels, tuple(listing.classes), source, np.arange(len(files), dtype=np.int64))


@dataclass(frozen=True, eq=False)
class FileSource:
    """Image files, decoded to RGB.

    Attributes:
        folder: what the file names are relative to.
        files: one file name per row.
        preprocess: how to bring images to one size; None leaves them, and refuses unequal ones.
    """

    folder: Path
    files: tuple[str, ...]
    preprocess: Preprocess | None

    def read(self, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        """Return those images, float32 (B, 3, H, W), contiguous, newly allocated.

        Raises:
            UsageError: a file is not a readable 8-bit image, or has another size than the rest.
        """
        # Pillow decodes and resizes outside Python's lock.
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            pixels = list(pool.map(self._pixels, rows.tolist()))
        if not pixels:
            return torch.empty(0, 3, *self._size)
        raw = torch.from_numpy(np.stack(pixels))
        return (raw.to(torch.float32) / 255).permute(0, 3, 1, 2).contiguous()

    def content(self, rows: npt.NDArray[np.int64]) -> Iterator[bytes]:
        """Yield the names and sizes of those files, and the preprocessing."""
        yield repr(self.preprocess).encode()
        for row in rows:
            file = self.files[row]
            try:
                size = (self.folder / file).stat().st_size
            except OSError as error:
                raise _unreadable(self.folder / file, error) from error
            yield f"{file.replace(os.sep, '/')}\0{size}\n".encode()

    @cached_property
    def _size(self) -> tuple[int, int]:
        """(height, width) of every image; without preprocessing that of the first."""
        if self.preprocess is not None:
            return self.preprocess.size
        width, height = _decode(self.folder / self.files[0]).size
        return height, width

    def _pixels(self, row: int) -> npt.NDArray[np.uint8]:
        """Return one image, uint8 (H, W, 3)."""
        file = self.folder / self.files[row]
        image = _decode(file)
        if self.preprocess is not None:
            image = _fit(image, self.preprocess)
        elif (image.height, image.width) != self._size:
            height, width = self._size
            raise UsageError(
                f"{file} is {image.height} x {image.width} pixels, other images are {height} x {width}; "
                "write a model with a known input size, or add ?size=N to the model."
            )
        return np.asarray(image)


def _decode(file: Path) -> Image.Image:
    """Read an image file of any colour mode as RGB."""
    try:
        with Image.open(file) as image:
            mode = image.mode
            # Pillow warns when transparency of a palette goes straight to RGB.
            rgb: Image.Image = (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")
    except _DAMAGE as error:
        raise _unreadable(file, error) from error
    if mode.startswith(("I", "F")):
        raise UsageError(f"{file} has more than 8 bits per pixel (mode {mode}); write it as an 8-bit image.")
    return rgb


def _unreadable(file: Path, error: Exception) -> UsageError:
    return UsageError(f"{file} cannot be read as an image ({error}); replace it or remove it.")


def _fit(image: Image.Image, preprocess: Preprocess) -> Image.Image:
    """Resize the shorter side and crop the centre, to the pixel as torchvision does."""
    from torchvision.transforms import functional

    if preprocess.resize is not None:
        mode = functional.InterpolationMode(preprocess.interpolation)
        image = functional.resize(image, preprocess.resize, interpolation=mode)
    cropped: Image.Image = functional.center_crop(image, list(preprocess.size))
    return cropped
