"""Files that hold a whole model, and nets that take images of one shape. Imports no torch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from robustkit.core.errors import expand_path
from robustkit.models.first_bytes import POINTER, first_bytes, pointer_error

if TYPE_CHECKING:
    from robustkit.models.strings import ModelString

_CHUNK = 1 << 20


def path_of(spec: ModelString) -> Path:
    """Return the absolute path of the file that a model string names.

    Raises:
        UsageError: There is no such file, or it cannot be read, is empty or a pointer of Git LFS.
    """
    path = expand_path(spec.name).absolute()
    if first_bytes(path, "model file") == POINTER:
        raise pointer_error(path, "model file")
    return path


def file_identity(path: Path) -> dict[str, object]:
    """Return what identifies a model file, wherever it lies: the hash of its content."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return {"file_sha256": digest.hexdigest()}
