"""Sentences about the size of the attacked images and about the model's weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from robustkit.runs.evaluation_record import Report


def size(report: Report) -> str:
    """Return the size at which images were attacked, as `32x32`; empty if the record does not have it."""
    space = _pixels(report)
    return _sides(space["attacked"], "x") if space else ""


def remarks(report: Report) -> list[str]:
    """Return remarks on resizing before the attack or inside the model, and on the loaded weights."""
    space, lines = _pixels(report), []
    if space.get("enlarged"):
        lines.append(
            f"image files were enlarged to {_sides(space['attacked'])} pixels before the attack: "
            f"{space['enlarged']} of {space['files']} looked at, by a median of {space['times']:.3g} times"
        )
    if space and space["net"] != space["attacked"]:
        more = space["net"][0] * space["net"][1] > space["attacked"][0] * space["attacked"][1]
        verb = "enlarged" if more else "reduced"
        lines.append(
            f"images were attacked at {_sides(space['attacked'])} pixels and {verb} to "
            f"{_sides(space['net'])} inside the model"
        )
    notes = report.environment.get("model_notes")
    return lines + [note for note in notes if isinstance(note, str)] if isinstance(notes, list) else lines


def _pixels(report: Report) -> dict[str, Any]:
    """Return the record's sizes in pixels; empty if they are missing or malformed."""
    space = report.environment.get("pixels")
    if not isinstance(space, dict) or not all(_is_size(space.get(name)) for name in ("attacked", "net")):
        return {}
    numbers = [space.get(name, 0) for name in ("files", "enlarged", "times")]
    return space if all(isinstance(number, (int, float)) for number in numbers) and len(space) in (2, 5) else {}


def _is_size(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(side, int) for side in value)


def _sides(sides: Sequence[int], between: str = " x ") -> str:
    return between.join(map(str, sides))
