"""The data sets that torchvision reads from disk: arrays for the small ones, image files for ImageNet."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from robustkit.core.errors import UsageError
from robustkit.data.catalog import CATALOG
from robustkit.data.request import DataRequest
from robustkit.data.samples import Samples
from robustkit.data.sources.arrays import array_samples
from robustkit.data.sources.image_files import image_folder

# The errors of torchvision's readers for files that are absent, damaged, or cannot be downloaded.
_FAILURE = (RuntimeError, OSError, ValueError, AssertionError, LookupError, EOFError)


def small_set(request: DataRequest) -> Samples:
    """Return one of torchvision's small sets, held in memory, in the order of its files.

    Raises:
        UsageError: the files are not below root, are damaged, or cannot be downloaded.
    """
    name = request.spec.name
    dataset = _read(name, request.split, request.root, request.download)
    images = np.asarray(dataset.data)
    if images.ndim == 3:
        images = images[..., None]
    if name == "svhn":
        labels, classes = dataset.labels, tuple(str(digit) for digit in range(10))
    else:
        labels, classes = np.asarray(dataset.targets), tuple(dataset.classes)
    return array_samples(images, labels, request.name, channels_last=name != "svhn", classes=classes)


def imagenet(request: DataRequest) -> Samples:
    """Return ImageNet-1k from class folders in `root/imagenet/SPLIT` or `root/SPLIT`, shuffled as any folder.

    Raises:
        UsageError: there is no such folder, or it does not hold the 1,000 classes.
    """
    split, root = request.split, request.root
    candidates = (root / "imagenet" / split, root / split)
    folder = next((candidate for candidate in candidates if os.path.isdir(candidate)), None)
    if folder is None:
        raise UsageError(
            f"imagenet:{split} is neither in {candidates[0]} nor in {candidates[1]}, and it cannot be downloaded; "
            "unpack it there, one folder per class, or write --data-root DIR for where it is."
        )
    samples = image_folder(folder, request.name, request.preprocess)
    count = len(samples.classes or ())
    if count != 1000:
        # With a class missing, every label after it would be off by one.
        raise UsageError(
            f"{folder} has {count} class folders instead of ImageNet's 1000; write folder:{folder} for a subset."
        )
    return samples


def _read(name: str, split: str, root: Path, download: bool) -> Any:
    from torchvision import datasets

    reader = getattr(datasets, CATALOG[name].reader)
    part = {"split": split} if name == "svhn" else {"train": split == "train"}
    try:
        # Downloads may print, and stdout is for results; NumPy warns of CIFAR's old pickles.
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return reader(root=str(root), download=download, **part)
    except _FAILURE as error:
        if download:
            raise UsageError(
                f"{name}:{split} could not be downloaded to {root} ({_first_line(error)}); "
                "check the network and the folder, or write --data-root DIR for where it is."
            ) from error
        raise UsageError(
            f"{name}:{split} is not, or not whole, in {root}; "
            "add --download to fetch it, or write --data-root DIR for where it is."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".:")
