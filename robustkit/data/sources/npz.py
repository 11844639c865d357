"""Samples of an `.npz` file: `x`, `y` and optionally `classes`. Nothing in the file is ever unpickled."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np

from robustkit.core.errors import UsageError
from robustkit.data.labels import check_count, class_numbers
from robustkit.data.regular_files import open_regular
from robustkit.data.request import DataRequest, absolute_path
from robustkit.data.samples import Samples
from robustkit.data.sources.archive import DAMAGE, header, member
from robustkit.data.sources.arrays import array_samples, check_form
from robustkit.data.sources.layout import channels_last

_MAX_NAMES = 16 << 20


def load(request: DataRequest) -> Samples:
    """Return the samples of an `.npz` file, large uncompressed arrays memory-mapped.

    The headers of all arrays are checked before any of them is read, and the labels are read before the images.

    Their name is the absolute path. The layout is `NCHW` or `NHWC`, as the request says; by default NHWC for uint8
    and NCHW for floats.

    Raises:
        UsageError: the file is absent, damaged, too large, or not of the documented form.
    """
    path, layout = absolute_path(request.spec.head), request.spec.options.get("layout")
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            found = {name[:-4] for name in archive.namelist() if name.endswith(".npy")}
            for key in ("x", "y"):
                if key not in found:
                    listed = ", ".join(sorted(found)) or "nothing"
                    raise UsageError(
                        f"{path} has no {key!r}, it has {listed}; write x (images) and y (integer labels)."
                    )
            x, y = header(path, archive, "x"), header(path, archive, "y")
            check_form(x.shape, x.dtype, str(path))
            what = f"{path}: the {x.dtype} images x"
            last = channels_last(x.shape, layout, x.dtype == np.uint8, what, f"{path.name}?layout={{}}")
            check_count(y.shape, str(path), x.shape[0])
            names = _classes(path, archive) if "classes" in found else None
            numbers, names = class_numbers(member(path, archive, "y"), str(path), x.shape[0], names)
            images = member(path, archive, "x")
    except UsageError:
        raise
    except OSError as error:
        raise _unreadable(path, error) from error
    except DAMAGE as error:
        raise _damaged(path) from error
    # Names without an order are numbered as they sort.
    by_name = names is not None and "classes" not in found
    return array_samples(images, numbers, str(path), channels_last=last, classes=names, by_name=by_name)


def _classes(path: Path, archive: zipfile.ZipFile) -> tuple[str, ...]:
    found = header(path, archive, "classes")
    if found.dtype.kind != "U" or len(found.shape) != 1:
        raise UsageError(
            f"{path}: 'classes' is {found.dtype} of shape {found.shape}; write one string per class, shape (K,)."
        )
    if found.size > _MAX_NAMES:
        raise UsageError(
            f"{path}: 'classes' takes {found.size:,} bytes, more than the {_MAX_NAMES:,} that are read; "
            "write shorter names."
        )
    return tuple(str(name) for name in member(path, archive, "classes"))


def _unreadable(path: Path, error: OSError) -> UsageError:
    if os.path.isdir(path):
        return UsageError(f"{path} is a folder, not an .npz file; write folder:{path} if it holds images.")
    if not os.path.exists(path):
        return UsageError(f"there is no file {path}; write the path of an .npz file with x and y.")
    reason = error.strerror or error
    if not os.path.isfile(path):
        return UsageError(f"{path} cannot be read ({reason}); write the path of an .npz file with x and y.")
    return UsageError(f"{path} cannot be read ({reason}); check its permissions and its disk.")


def _damaged(path: Path) -> UsageError:
    with path.open("rb") as file:
        start = file.read(4)
    if not start:
        return UsageError(f"{path} is empty; write it again with numpy.savez(path, x=..., y=...).")
    if start[:2] != b"PK":
        return UsageError(f"{path} is not an .npz archive; write it with numpy.savez(path, x=..., y=...).")
    return UsageError(f"{path} is truncated or damaged; copy or write it again.")
