"""Samples in WebDataset's tar shards, read by index: only the images in use are in memory."""

from __future__ import annotations

import itertools
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from robustkit.core.errors import UsageError
from robustkit.core.preprocess import Preprocess
from robustkit.data.decoding import EncodedImages, check_interpolation, read_limited
from robustkit.data.regular_files import open_regular
from robustkit.data.request import DataRequest
from robustkit.data.samples import Samples
from robustkit.data.sources import tar_index
from robustkit.data.sources.folder_listing import is_hidden

_RANGE = re.compile(r"\{([0-9]+)\.\.([0-9]+)\}")
# The most shards of one data set, and digits of a shard's number.
MAX_SHARDS = 100_000
_MAX_DIGITS = 12


def load(request: DataRequest) -> Samples:
    """Return the samples of tar shards, in a fixed shuffle, so that the first n are a random sample.

    The path is that of a shard, of a folder of them, or of several as `{000..099}.tar`. Their index is kept in the
    folder of data sets. Without `preprocess` all images must have one size.

    Raises:
        UsageError: there are no such shards, one is damaged, or a sample has not one image and one label.
    """
    if not request.spec.rest:
        raise UsageError(
            "'webdataset:' names no shards; write webdataset:PATH with a .tar file or a folder of them."
        )
    path, preprocess = request.path, request.preprocess
    check_interpolation(preprocess)
    shards = _expanded(path)
    entries = tar_index.index(shards, request.root / "index")
    if not len(entries):
        raise UsageError(f"{path} holds no samples; write images as KEY.jpg, or such, each with KEY.cls.")
    order = np.random.RandomState(0).permutation(len(entries))
    return Samples(
        request.name, entries["label"][order], None, ShardSource(tuple(shards), entries, preprocess), order
    )


@dataclass(frozen=True, eq=False)
class ShardSource(EncodedImages):
    """Images inside tar files.

    Files are opened for each image, so that threads and processes share nothing.

    Attributes:
        shards: the tar files.
        entries: where each image lies (`tar_index.ENTRY`).
        preprocess: how to bring images to one size.
    """

    shards: tuple[Path, ...]
    entries: npt.NDArray[Any]
    preprocess: Preprocess | None

    def encoded(self, row: int) -> bytes:
        """Return the image's bytes."""
        entry = self.entries[row]
        shard = self.shards[entry["shard"]]
        try:
            file = open_regular(shard)
        except OSError as error:
            raise tar_index.unreadable(shard, error.strerror or error) from error
        with file:
            file.seek(entry["offset"])
            return read_limited(file, int(entry["size"]))

    def title(self, row: int) -> str:
        """Return the shard's path and the image's name in it."""
        entry = self.entries[row]
        shard = self.shards[entry["shard"]]
        return f"{shard}: {tar_index.name_of(shard, int(entry['offset']))}"


def _expanded(path: Path) -> list[Path]:
    """Return the shards that a path names; all of them must exist."""
    if os.path.isdir(path):
        shards = sorted(file for file in path.glob("*.tar") if not is_hidden(file.name))
        if not shards:
            raise UsageError(f"{path} holds no .tar file; write webdataset:PATH with the shards' folder.")
        return shards
    parts = _RANGE.split(str(path))
    texts, ranges = parts[::3], [*zip(parts[1::3], parts[2::3], strict=True)]
    # The number of shards is checked before the range is expanded.
    if any(len(end) > _MAX_DIGITS for ends in ranges for end in ends):
        raise _too_many(path)
    choices = [range(int(first), int(last) + 1) for first, last in ranges]
    if math.prod(map(len, choices)) > MAX_SHARDS:
        raise _too_many(path)
    for (first, last), numbers in zip(ranges, choices, strict=True):
        if not numbers:
            raise UsageError(f"the range {{{first}..{last}}} is empty; write its smaller number first.")
    shards = [
        Path("".join(itertools.chain(*zip(texts, [*map(_padded, ranges, numbers), ""], strict=True))))
        for numbers in itertools.product(*choices)
    ]
    # Unlike Path.is_file, os.path's returns False for an invalid file name.
    missing = [shard for shard in shards if not os.path.isfile(shard)]
    if missing and os.path.exists(missing[0]):
        raise UsageError(f"{missing[0]} is no ordinary file; write webdataset:PATH with a shard or its folder.")
    if missing:
        others = f", nor {len(missing) - 1} others of {len(shards)}" if len(missing) > 1 else ""
        raise UsageError(
            f"there is no file {missing[0]}{others}; "
            "write webdataset:PATH with a shard, a folder of shards, or several as {000..099}.tar."
        )
    return shards


def _padded(ends: tuple[str, str], number: int) -> str:
    """Return a number of a range, as wide as its ends where one of them begins with 0, as in a shell."""
    padded = any(len(end) > 1 and end[0] == "0" for end in ends)
    return str(number).zfill(max(map(len, ends)) if padded else 0)


def _too_many(path: Path) -> UsageError:
    text = str(path) if len(str(path)) < 200 else f"{str(path)[:200]}..."
    return UsageError(f"{text} names more than {MAX_SHARDS:,} shards; write smaller ranges.")
