"""Safe writing of files: atomically through a temporary file, and never through links.

A folder received from someone else may contain links under predictable names. So the temporary file has a
random name and is created exclusively, and the finished file replaces whatever has its name, including a link.
A file that is changed in place must not be a link, because another file would change.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from robustkit.core.errors import RunError, UsageError

# Names of the temporary files, which a killed process may leave.
DRAFT = re.compile(r"\.robustkit-[0-9a-f]{16}\.part")
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def replacing(path: Path, previous: Path | None = None) -> Iterator[BinaryIO]:
    """Write a file atomically: it gets its name only after all of it is on the disk.

    Args:
        path: the file; a file or link of this name is replaced, not followed.
        previous: new name, in the same folder, of the file that is replaced.

    Yields:
        The open temporary file.

    Raises:
        RunError: if it cannot be written.
    """
    try:
        _require_replaceable(path)
        draft = path.with_name(f".robustkit-{secrets.token_hex(8)}.part")
        try:
            with os.fdopen(os.open(draft, _NEW, 0o666), "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if previous is not None and path.is_file():
                path.replace(previous)
            draft.replace(path)
        except BaseException:
            with suppress(OSError):
                draft.unlink()
            raise
        _sync(path.parent)
    except OSError as error:
        raise not_written(path, error) from error


def write(path: Path, content: bytes) -> None:
    """Write a file atomically (see `replacing`), unless it already has this content."""
    with suppress(OSError):
        if path.is_file() and not path.is_symlink() and path.read_bytes() == content:
            return
    with replacing(path) as file:
        file.write(content)


def remove_drafts(folder: Path) -> None:
    """Remove the temporary files of killed processes from a folder that no other process writes to."""
    for file in folder.iterdir():
        if DRAFT.fullmatch(file.name):
            file.unlink()


def not_written(path: Path, error: OSError) -> RunError:
    """Return the error for a file or folder that cannot be written."""
    if error.errno in _FULL:
        advice = "make room and run the same command again to resume"
    elif is_read_only(error):
        advice = "choose another folder with --out, or change its permissions"
    else:
        advice = "run the same command again once it can be"
    return RunError(f"cannot write {path}: {reason(error)}; {advice}.")


def reason(error: OSError) -> str:
    """Return why a file cannot be written, as part of a sentence."""
    if error.errno in _FULL:
        return "the disk is full"
    return error.strerror or str(error)


def is_read_only(error: BaseException | None) -> bool:
    """Return whether an error means that a file or folder is read-only."""
    return isinstance(error, OSError) and error.errno in _READ_ONLY


def subfolder(parent: Path, name: str) -> Path:
    """Return a folder within a run folder, created if it is missing.

    Raises:
        UsageError: if it is a link: files would be written elsewhere.
        RunError: if it cannot be created.
    """
    path = parent / name
    refuse_link(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_written(path, error) from error
    return path


def refuse_link(*paths: Path) -> None:
    """Refuse links among files that will be changed in place and folders that will be written to.

    Raises:
        UsageError: if one is a link or hard link, or neither a file nor a folder.
    """
    for path in paths:
        try:
            status = path.lstat()
        except OSError:
            continue
        if stat.S_ISLNK(status.st_mode):
            raise UsageError(f"{path} is a link, and robustkit does not write through links; delete it.")
        if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
            raise UsageError(
                f"{path} is a hard link: the file has another name, and would change there too; put a copy in its "
                "place."
            )
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            raise UsageError(f"{path} is not a regular file; delete it.")


def unlink_link(path: Path) -> None:
    """Remove a file without content, such as a lock, if it is a link or not a regular file."""
    try:
        refuse_link(path)
    except UsageError:
        path.unlink()


def _require_replaceable(path: Path) -> None:
    """Raise OSError for folders and devices, which must not be replaced."""
    if path.is_dir() and not path.is_symlink():
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if (path.exists() and not path.is_file() and not path.is_dir()) or path.absolute().parent == Path("/dev"):
        raise OSError(errno.EINVAL, "it is not a regular file")


def _sync(folder: Path) -> None:
    """Flush a folder's directory entries to the disk, if the system supports it."""
    if os.name != "posix":
        return
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
