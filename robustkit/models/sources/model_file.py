"""Files that hold a whole model, and nets that take images of one shape. Imports no torch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from robustkit.core.errors import UsageError, expand_path

if TYPE_CHECKING:
    from robustkit.models.strings import ModelString

_POINTER = b"version https://git-lfs"
_CHUNK = 1 << 20


def path_of(spec: ModelString) -> Path:
    """Return the absolute path of the file that a model string names.

    Raises:
        UsageError: There is no such file, or it cannot be read, is empty or a pointer of Git LFS.
    """
    path = expand_path(spec.name).absolute()
    if path.is_dir():
        raise UsageError(f"model file '{path}' is a folder: write the file in it.")
    if path.exists() and not path.is_file():
        raise UsageError(f"model file '{path}' is no regular file: write a file on a disk.")
    try:
        with path.open("rb") as stream:
            start = stream.read(len(_POINTER))
    except FileNotFoundError as error:
        raise UsageError(f"there is no model file '{path}': check the path.") from error
    except OSError as error:
        raise UsageError(
            f"model file '{path}' cannot be read ({error.strerror}): check its permissions."
        ) from error
    if not start:
        raise UsageError(f"model file '{path}' is empty: save or download it again.")
    if start == _POINTER:
        raise UsageError(f"model file '{path}' is a pointer of Git LFS: fetch the file by 'git lfs pull'.")
    return path


def file_identity(path: Path) -> dict[str, object]:
    """Return what identifies a model file, wherever it lies: the hash of its content."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return {"file_sha256": digest.hexdigest()}
