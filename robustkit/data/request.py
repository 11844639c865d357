"""What a loader of the catalog is called with. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from robustkit.core.errors import expand_path
from robustkit.core.preprocess import Preprocess
from robustkit.data.strings import DataString


@dataclass(frozen=True)
class DataRequest:
    """A data string and where and how to read it.

    Attributes:
        spec: the data string in its parts.
        split: the split, of a set that has splits; else empty.
        data_root: folder of downloaded data sets; None for the default.
        download: whether a missing data set is downloaded.
        preprocess: how image files are resized and cropped for the model.
    """

    spec: DataString
    split: str
    data_root: Path | None
    download: bool
    preprocess: Preprocess | None

    @property
    def root(self) -> Path:
        """The absolute folder of downloaded data sets."""
        return default_root() if self.data_root is None else absolute_path(self.data_root)

    @property
    def name(self) -> str:
        """The name of the samples: of a set with its split, else of the kind with its absolute path."""
        return f"{self.spec.name}:{self.split or self.path}"

    @property
    def path(self) -> Path:
        """The part after the colon as an absolute path."""
        return absolute_path(self.spec.rest or "")


def default_root() -> Path:
    """Return the default folder of downloaded data sets."""
    return absolute_path(os.environ.get("ROBUSTKIT_DATA") or "~/.cache/robustkit/data")


def absolute_path(path: str | Path) -> Path:
    """Return the path with ~ and .. resolved, without reading the disk."""
    return Path(os.path.abspath(expand_path(path)))
