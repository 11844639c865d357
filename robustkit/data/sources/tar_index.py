"""The shard and offset of each image: found by reading the shards' headers once, then kept in a cache.

The files of a shard are grouped as WebDataset does: consecutive ones whose paths agree up to the first dot of the
name are one sample, and what follows the dot is the kind. A sample needs an image and its class, a whole number
in a file of kind `cls`; files of other kinds are skipped.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from robustkit.core.errors import RunError, UsageError
from robustkit.core.writing import replacing
from robustkit.data.regular_files import open_regular
from robustkit.data.sources.folder_listing import KINDS, is_hidden
from robustkit.data.sources.tar_headers import TarError, headers

LABEL = "cls"
# An image in 28 bytes: which shard, where in it and how many bytes, the class.
ENTRY = np.dtype([("shard", "<i4"), ("offset", "<i8"), ("size", "<i8"), ("label", "<i8")])
# Changes with the content of an index, so that older ones are not used.
_FORMAT = 2
_LONGEST_LABEL = 32
_MAX_CLASSES = 2**31


class Member(NamedTuple):
    """A file in a shard: `key.kind`, its bytes, and those of a label themselves."""

    key: str
    kind: str
    offset: int
    size: int
    text: bytes


def index(shards: Sequence[Path], cache: Path) -> npt.NDArray[Any]:
    """Return an `ENTRY` for each image, in the order of the shards and of the images in them.

    It is read from the cache folder, or made and stored there; if the folder is read-only it is made each time.

    Raises:
        UsageError: a shard is absent, damaged or compressed, or a sample lacks its image or its label.
    """
    place = cache / f"{_state(shards)}.npy"
    try:
        known: npt.NDArray[Any] = np.load(place, allow_pickle=False)
        if known.dtype == ENTRY:
            return known
    except (OSError, ValueError, EOFError):
        pass
    index = np.fromiter(_entries(shards), ENTRY)
    _keep(place, index)
    return index


def name_of(shard: Path, offset: int) -> str:
    """Return the name of the file whose bytes begin at an offset."""
    return next((f"{one.key}.{one.kind}" for one in _members(shard) if one.offset == offset), f"byte {offset}")


def unreadable(shard: Path, reason: object) -> UsageError:
    """Return the error for a shard that is damaged or gone."""
    return UsageError(f"{shard} cannot be read as a tar file ({reason}); copy or write it again, uncompressed.")


def _state(shards: Sequence[Path]) -> str:
    """Return a hash that identifies these shards and their current content."""
    total = hashlib.sha256(f"{_FORMAT}".encode())
    for shard in shards:
        try:
            state = shard.stat()
        except OSError as error:
            raise unreadable(shard, error.strerror or error) from error
        total.update(f"\n{shard}\0{state.st_size}\0{state.st_mtime_ns}".encode())
    return total.hexdigest()[:32]


def _keep(place: Path, index: npt.NDArray[Any]) -> None:
    """Write it atomically: other processes may be reading or writing the same file."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with replacing(place) as file:
            np.save(file, index)
    except (OSError, RunError):
        return


def _entries(shards: Sequence[Path]) -> Iterator[tuple[int, int, int, int]]:
    for number, shard in enumerate(shards):
        for key, group in itertools.groupby(_members(shard), lambda member: member.key):
            files = list(group)
            images = [file for file in files if file.kind in KINDS]
            labels = [file for file in files if file.kind == LABEL]
            if not images and not labels:
                continue
            if len(images) != 1:
                present = " and ".join(f"{key}.{file.kind}" for file in images) or "no image"
                raise UsageError(f"{shard}: sample {key!r} has {present}; write one image each, as {key}.jpg.")
            if len(labels) != 1:
                present = f"{len(labels)} labels" if labels else "no label"
                raise UsageError(
                    f"{shard}: sample {key!r} has {present}; write its class as a number in {key}.cls."
                )
            (image,) = images
            yield number, image.offset, image.size, _label(shard, labels[0])


def _label(shard: Path, file: Member) -> int:
    try:
        label = int(file.text)
        if not 0 <= label < _MAX_CLASSES or file.size > _LONGEST_LABEL:
            raise ValueError
        return label
    except ValueError:
        text = file.text.decode(errors="replace")
        raise UsageError(
            f"{shard}: {file.key}.{LABEL} holds {text!r}; write a class as a whole number from 0 up."
        ) from None


def _members(shard: Path) -> Iterator[Member]:
    """Yield the files of a shard that have a kind; hidden ones, which some systems add, are skipped."""
    try:
        with open_regular(shard) as content:
            for file in headers(content, os.fstat(content.fileno()).st_size):
                folder, slash, name = file.name.rpartition("/")
                stem, dot, kind = name.partition(".")
                kind = kind.lower()
                hidden = any(is_hidden(part) for part in file.name.split("/") if part not in (".", ".."))
                if not (stem and dot) or hidden:
                    continue
                text = b""
                if kind == LABEL:
                    content.seek(file.offset)
                    text = content.read(min(file.size, _LONGEST_LABEL))
                yield Member(f"{folder}{slash}{stem}", kind, file.offset, file.size, text)
    except TarError as error:
        raise unreadable(shard, error) from error
    except OSError as error:
        raise unreadable(shard, error.strerror or error) from error
