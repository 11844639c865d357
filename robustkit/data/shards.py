"""Samples in WebDataset's tar shards, read by index: no more of them is in memory than is asked for."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from robustkit.data import tar_index
from robustkit.data.pictures import Pictures, check_interpolation
from robustkit.data.samples import Samples
from robustkit.errors import UsageError
from robustkit.preprocess import Preprocess

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def webdataset(path: Path, name: str, preprocess: Preprocess | None, cache: Path) -> Samples:
    """Return the samples of tar shards, in a fixed shuffle, so that the first n are a random sample.

    Args:
        path: a shard, a folder of them, or several as `{000..099}.tar`.
        name: what errors and records call these samples.
        preprocess: how to bring images to one size; without it they must have one.
        cache: the folder where the index is kept.

    Raises:
        UsageError: there are no such shards, one is damaged, or a sample has not one image and one label.
    """
    check_interpolation(preprocess)
    shards = _expanded(path)
    entries = tar_index.index(shards, cache)
    if not len(entries):
        raise UsageError(f"{path} holds no samples; write images as KEY.jpg, or such, each with KEY.cls.")
    order = np.random.RandomState(0).permutation(len(entries))
    return Samples(name, entries["label"][order], None, ShardSource(tuple(shards), entries, preprocess), order)


@dataclass(frozen=True, eq=False)
class ShardSource(Pictures):
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

    def encoded(self, row: int) -> io.BytesIO:
        """Return the image's bytes."""
        entry = self.entries[row]
        shard = self.shards[entry["shard"]]
        try:
            with shard.open("rb", buffering=0) as file:
                file.seek(entry["offset"])
                found = file.read(entry["size"])
        except OSError as error:
            raise tar_index.unreadable(shard, error.strerror or error) from error
        return io.BytesIO(found)

    def title(self, row: int) -> str:
        """Return the shard's path and the image's name in it."""
        entry = self.entries[row]
        shard = self.shards[entry["shard"]]
        return f"{shard}: {tar_index.name_of(shard, int(entry['offset']))}"

    def content(self, rows: npt.NDArray[np.int64]) -> Iterator[bytes]:
        """Yield hashes of those images' names and sizes, and the preprocessing."""
        yield repr(self.preprocess).encode()
        yield self.entries["mark"][rows].tobytes()


def _expanded(path: Path) -> list[Path]:
    """Return the shards that a path stands for; all of them must be there."""
    if path.is_dir():
        shards = sorted(path.glob("*.tar"))
        if not shards:
            raise UsageError(f"{path} holds no .tar file; write webdataset:PATH with the shards' folder.")
        return shards
    parts = _RANGE.split(str(path))
    texts, ranges = parts[::3], zip(parts[1::3], parts[2::3], strict=True)
    choices = [_numbers(first, last) for first, last in ranges]
    shards = [
        Path("".join(itertools.chain(*zip(texts, [*numbers, ""], strict=True))))
        for numbers in itertools.product(*choices)
    ]
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        others = f", nor {len(missing) - 1} others of {len(shards)}" if len(missing) > 1 else ""
        raise UsageError(
            f"there is no file {missing[0]}{others}; "
            "write webdataset:PATH with a shard, a folder of shards, or several as {000..099}.tar."
        )
    return shards


def _numbers(first: str, last: str) -> list[str]:
    """Return the numbers of a range, as wide as its ends where one of them begins with 0, as in a shell."""
    padded = any(len(end) > 1 and end[0] == "0" for end in (first, last))
    width = max(len(first), len(last)) if padded else 0
    return [str(number).zfill(width) for number in range(int(first), int(last) + 1)]
