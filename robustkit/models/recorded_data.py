"""Which data a file may name (what models, see `robustkit.models.allowed_paths`)."""

from __future__ import annotations

import os
from pathlib import Path

from robustkit.core.errors import UsageError
from robustkit.data.strings import DataString
from robustkit.models.allowed_paths import check_path


def recorded_data(string: str, where: object) -> str:
    """Return the data string of a run's record if it may be read.

    Raises:
        UsageError: it names what is not on this machine's disks, or a whole disk or home folder.
    """
    spec = DataString.parse(string)
    classes = spec.options.get("classes")
    # A file, unless it is names with commas between.
    if classes is not None and ("," not in classes or any(sign in classes for sign in ("/", "\\"))):
        check_path(classes, where, "--data")
    path = (spec.rest or "") if spec.is_path else spec.head
    # Data with a name of its own, such as cifar10:test, has neither.
    if path != spec.head or any(sign in path for sign in ("/", "\\", ".npz")):
        check_path(path, where, "--data")
        if Path(os.path.normpath(path)) in (Path(Path(path).anchor), Path.home()):
            raise UsageError(f"{where} names the folder {path!r} as data, which is no data set: give --data.")
    return string
