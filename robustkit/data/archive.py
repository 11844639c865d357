"""Arrays of an `.npz` archive, large ones memory-mapped. Imports no torch."""

from __future__ import annotations

import math
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from robustkit.errors import UsageError

# Smaller members are read at once, which also checks their CRC; larger ones are mapped if not compressed.
_MAP_FROM = 64 << 20
# What a damaged, truncated, encrypted or oddly packed archive makes zipfile and numpy raise.
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


def member(path: Path, archive: zipfile.ZipFile, key: str, mode: Literal["r", "c"] = "r") -> npt.NDArray[Any]:
    """Read or map one array of the archive, in the mode of `numpy.memmap`.

    Raises:
        UsageError: if it holds Python objects; one of `DAMAGE` if the archive is not whole.
    """
    info = archive.getinfo(f"{key}.npy")
    with archive.open(info) as stream:
        shape, fortran, dtype = _HEADERS[np.lib.format.read_magic(stream)](stream)
        if dtype.hasobject:
            raise UsageError(
                f"{path}: {key!r} holds pickled Python objects, which are never read; "
                "write a plain array of numbers, or of strings for classes."
            )
        start = stream.tell()
        size = math.prod(shape) * dtype.itemsize
        if size != info.file_size - start:
            raise EOFError(f"{key!r} announces {size} bytes and has {info.file_size - start}")
        if size < _MAP_FROM or info.compress_type != zipfile.ZIP_STORED:
            flat = np.frombuffer(stream.read(), dtype=dtype)
            return flat.reshape(shape, order="F" if fortran else "C")
    return np.memmap(
        path, dtype, mode=mode, offset=_offset(path, info) + start, shape=shape, order="F" if fortran else "C"
    )


def _offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Return where a stored member's bytes begin: its local header may be longer than the central one."""
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)
        name_length, extra_length = struct.unpack("<HH", file.read(4))
    return info.header_offset + 30 + int(name_length) + int(extra_length)
