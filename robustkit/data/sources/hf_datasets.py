"""Data sets of the Hugging Face hub or of a local folder that `datasets` reads: `hf-data:NAME[:CONFIG]:SPLIT`."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import numpy as np

from robustkit.core.errors import UsageError, error_summary
from robustkit.core.preprocess import Preprocess
from robustkit.data.decoding import EncodedImages, check_interpolation
from robustkit.data.labels import class_numbers
from robustkit.data.request import DataRequest
from robustkit.data.samples import Samples

LABELS = ("label", "labels", "fine_label", "target", "class", "y")


@dataclass(frozen=True, eq=False)
class HubSource(EncodedImages):
    """The encoded images of a column; `table` gives each as its bytes or its path."""

    table: Any
    column: str
    name: str
    preprocess: Preprocess | None

    def encoded(self, row: int) -> bytes:
        """Return the image's file."""
        value = self.table[row][self.column]
        content: bytes | None = value.get("bytes")
        if content is None:
            with open(value["path"], "rb") as file:
                return file.read()
        return content

    def title(self, row: int) -> str:
        """Return the name of the data set with the row."""
        return f"{self.name}, row {row},"


def load(request: DataRequest) -> Samples:
    """Return the samples of a split. No code of a data set is run.

    Raises:
        UsageError: `datasets` is missing, the data set or split cannot be loaded, or it has no images with labels.
    """
    if importlib.util.find_spec("datasets") is None:
        raise UsageError("hf-data: needs the library datasets; run pip install datasets, then the command again.")
    import datasets

    check_interpolation(request.preprocess)
    parts = (request.spec.rest or "").rsplit(":", 2)
    if len(parts) < 2 or not all(parts):
        head = request.spec.head
        raise UsageError(f"{head!r} names no split; write hf-data:NAME:SPLIT or hf-data:NAME:CONFIG:SPLIT.")
    name, split = ":".join(parts[:-1]), parts[-1]
    config = None
    if len(parts) == 3:
        name, config = parts[0], parts[1]
    try:
        table = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the library's errors have many types
        raise UsageError(
            f"{request.spec.head!r} could not be loaded ({error_summary(error)}); check the name, the split and "
            "the network."
        ) from error
    return samples(table, request.spec.head, request.preprocess)


def samples(table: Any, name: str, preprocess: Preprocess | None) -> Samples:
    """Return the samples of a loaded split, whose images stay encoded until they are used."""
    import datasets

    features = table.features
    images = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
    if len(images) != 1:
        raise UsageError(f"{name} has {len(images)} columns of images among {', '.join(features)}; it needs one.")
    label = next((key for key in LABELS if key in features), None)
    if label is None:
        raise UsageError(f"{name} has no column of labels among {', '.join(features)}; call it label.")
    names = getattr(features[label], "names", None)
    numbers, classes = class_numbers(
        np.asarray(table[label][:]), name, len(table), tuple(names) if names else None
    )
    table = table.cast_column(images[0], datasets.Image(decode=False))
    source = HubSource(table, images[0], name, preprocess)
    return Samples(name, numbers, classes, source, np.arange(len(table), dtype=np.int64), by_name=names is None)
