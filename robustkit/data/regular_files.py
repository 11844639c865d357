"""Opening of regular files only. Imports no torch."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file, or a link to one, for reading.

    Opening a named pipe would wait for a writer, and reading a device may never end.

    Raises:
        OSError: the file is absent, may not be read, or is a pipe, a socket, a device or a folder.
    """
    try:
        _refuse(os.stat(path).st_mode)
    except ValueError as error:  # a NUL in its name
        raise OSError(None, str(error)) from error
    # The file may have been replaced since.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        _refuse(os.fstat(descriptor).st_mode)
    except OSError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def _refuse(mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise OSError(None, f"it is {_KINDS.get(stat.S_IFMT(mode), 'no ordinary file')}, not an ordinary file")
