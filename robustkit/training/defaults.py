"""What a run takes where nobody says: the data set's own test split."""

from __future__ import annotations

from robustkit.data.catalog import CATALOG
from robustkit.data.classes import matched
from robustkit.data.samples import Samples
from robustkit.data.strings import DataString

_JUDGING = ("test", "val")


def judged_by(test: Samples, train: Samples) -> Samples:
    """Return the test data with the labels that the classes of the same names have in the training data."""
    return matched(test, len(train.classes) if train.classes else None, train.classes)


def sibling(data: str) -> str | None:
    """Return the data string of the held-out split that belongs to a training split; None where there is none."""
    spec = DataString.parse(data)
    name, entry = spec.name, CATALOG.get(spec.name)
    if entry is None or spec.rest in _JUDGING:
        return None
    held_out = [one for one in entry.splits if one in _JUDGING]
    return f"{name}:{held_out[0]}" if held_out else None
