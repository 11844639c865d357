"""Samples of image files in one folder per class, each decoded when it is used."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from robustkit.core.errors import UsageError
from robustkit.core.preprocess import Preprocess
from robustkit.data.decoding import EncodedImages, check_interpolation, read_limited
from robustkit.data.regular_files import open_regular
from robustkit.data.request import DataRequest
from robustkit.data.samples import Samples
from robustkit.data.sources.folder_listing import list_pictures


def load(request: DataRequest) -> Samples:
    """Return the samples of `folder:PATH`; `?classes=` says that its folders are classes, whatever their names.

    Raises:
        UsageError: the string names no folder, or not one of images in folders.
    """
    if not request.spec.rest:
        raise UsageError("'folder:' names no folder; write folder:PATH with one folder of images per class.")
    return image_folder(request.path, request.name, request.preprocess, nested="classes" in request.spec.options)


def image_folder(path: Path, name: str, preprocess: Preprocess | None, *, nested: bool = False) -> Samples:
    """Return the images below a folder as torchvision's ImageFolder labels them, without hidden files.

    The listing is sorted by class; a fixed shuffle makes the first n a random sample.

    Args:
        path: the folder that holds one folder per class.
        name: name of these samples in errors and records.
        preprocess: how to bring images to one size; without it they must have one.
        nested: treat folders that look like the parts of a data set as classes.

    Raises:
        UsageError: there is no such folder, or it holds no class folders with images.
    """
    check_interpolation(preprocess)
    if not os.path.isdir(path):
        what = "a file" if os.path.exists(path) else "not there"
        raise UsageError(f"{path} is {what}; write folder:PATH with a folder that holds one folder per class.")
    listing = list_pictures(path, nested=nested)
    order = np.random.RandomState(0).permutation(len(listing.files))
    files = tuple(listing.files[row] for row in order)
    labels = np.asarray(listing.labels, dtype=np.int64)[order]
    source = FileSource(path, files, preprocess)
    rows = np.arange(len(files), dtype=np.int64)
    return Samples(name, labels, listing.classes, source, rows, by_name=True, notes=listing.notes)


@dataclass(frozen=True, eq=False)
class FileSource(EncodedImages):
    """Image files.

    Attributes:
        folder: the folder that the file names are relative to.
        files: one file name per row.
        preprocess: how to bring images to one size.
    """

    folder: Path
    files: tuple[str, ...]
    preprocess: Preprocess | None

    def encoded(self, row: int) -> bytes:
        """Return the file's bytes."""
        with open_regular(self.folder / self.files[row]) as file:
            return read_limited(file, os.fstat(file.fileno()).st_size)

    def title(self, row: int) -> str:
        """Return the file's path."""
        return str(self.folder / self.files[row])
