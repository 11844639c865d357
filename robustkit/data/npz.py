"""Samples of an `.npz` file: `x`, `y` and optionally `classes`. Nothing in the file is ever unpickled."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from robustkit.data.archive import DAMAGE, member
from robustkit.data.arrays import array_samples
from robustkit.data.samples import Samples
from robustkit.errors import UsageError


def npz(path: Path) -> Samples:
    """Return the samples of an `.npz` file, large uncompressed arrays memory-mapped.

    Args:
        path: absolute, as it becomes the name of the samples.

    Raises:
        UsageError: the file is absent, damaged, or not what the contract says.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            found = {name[:-4] for name in archive.namelist() if name.endswith(".npy")}
            for key in ("x", "y"):
                if key not in found:
                    listed = ", ".join(sorted(found)) or "nothing"
                    raise UsageError(
                        f"{path} has no {key!r}, it has {listed}; write x (images) and y (integer labels)."
                    )
            images = member(path, archive, "x")
            labels = member(path, archive, "y")
            names = member(path, archive, "classes") if "classes" in found else None
    except UsageError:
        raise
    except OSError as error:
        raise _unreadable(path, error) from error
    except DAMAGE as error:
        raise _damaged(path) from error
    return array_samples(
        images, labels, str(path), channels_last=images.dtype == np.uint8, classes=_classes(path, names)
    )


def _classes(path: Path, names: npt.NDArray[Any] | None) -> tuple[str, ...] | None:
    if names is None:
        return None
    if names.dtype.kind != "U" or names.ndim != 1:
        raise UsageError(
            f"{path}: 'classes' is {names.dtype} of shape {names.shape}; write one string per class, shape (K,)."
        )
    return tuple(str(name) for name in names)


def _unreadable(path: Path, error: OSError) -> UsageError:
    if path.is_dir():
        return UsageError(f"{path} is a folder, not an .npz file; write folder:{path} if it holds images.")
    if not path.exists():
        return UsageError(f"there is no file {path}; write the path of an .npz file with x and y.")
    return UsageError(f"{path} cannot be read ({error.strerror or error}); check its permissions and its disk.")


def _damaged(path: Path) -> UsageError:
    with path.open("rb") as file:
        start = file.read(4)
    if not start:
        return UsageError(f"{path} is empty; write it again with numpy.savez(path, x=..., y=...).")
    if start[:2] != b"PK":
        return UsageError(f"{path} is not an .npz archive; write it with numpy.savez(path, x=..., y=...).")
    return UsageError(f"{path} is truncated or damaged; copy or write it again.")
