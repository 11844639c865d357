"""What a run takes where nobody says: the data set's own test split."""

from __future__ import annotations

from robustkit.data.catalog import CATALOG

_JUDGING = ("test", "val")


def sibling(data: str) -> str | None:
    """Return the data string of the held-out split that belongs to a training split; None where there is none."""
    name, _, split = data.partition(":")
    entry = CATALOG.get(name)
    if entry is None or split in _JUDGING:
        return None
    held_out = [one for one in entry.splits if one in _JUDGING]
    return f"{name}:{held_out[0]}" if held_out else None
