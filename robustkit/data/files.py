"""Samples of image files in one folder per class, each decoded when it is asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from robustkit.data.pictures import Pictures, check_interpolation, unreadable
from robustkit.data.samples import Samples
from robustkit.errors import UsageError
from robustkit.preprocess import Preprocess


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

    check_interpolation(preprocess)
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
class FileSource(Pictures):
    """Image files.

    Attributes:
        folder: what the file names are relative to.
        files: one file name per row.
        preprocess: how to bring images to one size.
    """

    folder: Path
    files: tuple[str, ...]
    preprocess: Preprocess | None

    def encoded(self, row: int) -> Path:
        """Return the file."""
        return self.folder / self.files[row]

    def title(self, row: int) -> str:
        """Return the file's path."""
        return str(self.folder / self.files[row])

    def content(self, rows: npt.NDArray[np.int64]) -> Iterator[bytes]:
        """Yield the names and sizes of those files, and the preprocessing."""
        yield repr(self.preprocess).encode()
        for row in rows:
            file = self.files[row]
            try:
                size = (self.folder / file).stat().st_size
            except OSError as error:
                raise unreadable(self.title(row), error) from error
            yield f"{file.replace(os.sep, '/')}\0{size}\n".encode()
