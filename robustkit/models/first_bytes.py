"""The first bytes of a file that a model string names, which tell what it is. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from robustkit.core.errors import UsageError

# What Git LFS leaves in the place of a large file begins so; as many bytes are read.
POINTER = b"version https://git-lfs"


def first_bytes(path: Path, kind: str, example: str = "") -> bytes:
    """Return the first bytes of a file, as many as `POINTER` has.

    Args:
        path: of the file.
        kind: what the file is called in errors, such as `weights file`.
        example: an addition to the advice for a folder.

    Raises:
        UsageError: it is a folder or no regular file, does not exist, cannot be read, or is empty.
    """
    if path.is_dir():
        raise UsageError(f"{kind} '{path}' is a folder: write the file in it{example}.")
    if path.exists() and not path.is_file():
        raise UsageError(f"{kind} '{path}' is no regular file: write a file on a disk.")
    try:
        with path.open("rb") as stream:
            start = stream.read(len(POINTER))
    except FileNotFoundError as error:
        raise UsageError(f"there is no {kind} '{path}': check the path.") from error
    except OSError as error:
        raise UsageError(f"{kind} '{path}' cannot be read ({error.strerror}): check its permissions.") from error
    if not start:
        raise UsageError(f"{kind} '{path}' is empty: save or download it again.")
    return start


def pointer_error(path: Path, kind: str) -> UsageError:
    """Return the error for a file that is a pointer of Git LFS."""
    return UsageError(f"{kind} '{path}' is a pointer of Git LFS: fetch the file by 'git lfs pull'.")
