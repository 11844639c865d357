"""The default test data of a training run: the held-out split of the data set."""

from __future__ import annotations

from robustkit.data.catalog import CATALOG
from robustkit.data.classes import match_classes
from robustkit.data.samples import Samples
from robustkit.data.strings import DataString

_HELD_OUT = ("test", "val")


def match_labels(test: Samples, train: Samples) -> Samples:
    """Return the test data with its labels renumbered as the classes of the same names in the training data."""
    return match_classes(test, len(train.classes) if train.classes else None, train.classes)


def held_out_split(data: str) -> str | None:
    """Return the data string of the held-out split of a training split's data set; None if there is none."""
    spec = DataString.parse(data)
    name, entry = spec.name, CATALOG.get(spec.name)
    if entry is None or spec.rest in _HELD_OUT:
        return None
    held_out = [split for split in entry.splits if split in _HELD_OUT]
    return f"{name}:{held_out[0]}" if held_out else None
