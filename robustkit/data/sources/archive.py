"""Arrays of an `.npz` archive, large ones memory-mapped. Imports no torch."""

from __future__ import annotations

import math
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from robustkit.core.errors import UsageError
from robustkit.core.memory import free_memory
from robustkit.data.regular_files import open_regular

# Smaller members are read at once, which also checks their CRC; larger ones are mapped if not compressed.
_MAP_FROM = 64 << 20
# The errors of zipfile and numpy for damaged, truncated, encrypted or unsupported archives.
DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    KeyError,
    ValueError,
    RuntimeError,
    struct.error,
    SyntaxError,
    tokenize.TokenError,
)
# By version of the `.npy` format; versions after these are for records only.
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class Header(NamedTuple):
    """The header of an array, and the offset of its numbers in the archive's member."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    start: int

    @property
    def size(self) -> int:
        """How many bytes the array takes."""
        return math.prod(self.shape) * self.dtype.itemsize


def header(path: Path, archive: zipfile.ZipFile, key: str) -> Header:
    """Return the header of one array; the array itself is not read.

    Raises:
        UsageError: it holds Python objects, or is packed in a way that numpy does not write; one of `DAMAGE` if
        the archive is damaged, or the header gives another size than the archive.
    """
    info = archive.getinfo(f"{key}.npy")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UsageError(
            f"{path}: {key!r} is packed by method {info.compress_type}; write it with numpy.savez or "
            "numpy.savez_compressed."
        )
    with archive.open(info) as stream:
        shape, fortran, dtype = _HEADERS[np.lib.format.read_magic(stream)](stream)
        entry = Header(shape, dtype, fortran, stream.tell())
    if dtype.hasobject:
        raise UsageError(
            f"{path}: {key!r} holds pickled Python objects, which are never read; "
            "write a plain array of numbers, or of strings for classes."
        )
    if min(shape, default=0) < 0 or entry.size != info.file_size - entry.start:
        raise EOFError(f"{key!r} announces {entry.size} bytes and has {info.file_size - entry.start}")
    return entry


def member(path: Path, archive: zipfile.ZipFile, key: str, mode: Literal["r", "c"] = "r") -> npt.NDArray[Any]:
    """Read or map one array of the archive, in the mode of `numpy.memmap`.

    Raises:
        UsageError: as `header`, or a compressed array does not fit into the memory that is free; one of `DAMAGE`
        if the archive is damaged.
    """
    info, entry = archive.getinfo(f"{key}.npy"), header(path, archive, key)
    order: Literal["F", "C"] = "F" if entry.fortran else "C"
    if entry.size >= _MAP_FROM and info.compress_type == zipfile.ZIP_STORED:
        start = _offset(path, info) + entry.start
        return np.memmap(path, entry.dtype, mode=mode, offset=start, shape=entry.shape, order=order)
    if entry.size > (room := free_memory() // 2):
        raise UsageError(
            f"{path}: {key!r} takes {entry.size / 2**30:,.1f} GiB unpacked, more than half of the free memory "
            f"({room / 2**30:,.1f} GiB); write it with numpy.savez, which needs no unpacking."
        )
    with archive.open(info) as stream:
        stream.read(entry.start)
        flat = np.frombuffer(stream.read(), dtype=entry.dtype)
    return flat.reshape(entry.shape, order=order)


def _offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Return where a stored member's bytes begin: its local header may be longer than the central one."""
    with open_regular(path) as file:
        file.seek(info.header_offset + 26)
        name_length, extra_length = struct.unpack("<HH", file.read(4))
    return info.header_offset + 30 + int(name_length) + int(extra_length)
