"""From texts on the command line to values. Each function raises ValueError that says what the text must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from robustkit.core.numbers import exact, whole

T = TypeVar("T")

UNITS = {"s": 1, "m": 60, "h": 3600}


def number_or_auto(text: str) -> int | None:
    """Return a whole number, None for `auto`."""
    try:
        return None if text == "auto" else whole(text)
    except ValueError:
        raise ValueError("a whole number, or auto") from None


def seconds(text: str) -> float:
    """Return the seconds of `90`, `90s`, `10m` or `2h`."""
    number, unit = (text[:-1], text[-1]) if text[-1:] in UNITS else (text, "s")
    try:
        return float(number) * UNITS[unit]
    except ValueError:
        raise ValueError("a number of seconds, or a time such as 90s, 10m or 2h") from None


def weights(text: str) -> list[float]:
    """Return the numbers of `1,1,2`."""
    return _listed(text, lambda part: float(exact(part)), "one number above 0 for each surrogate, e.g. 1,1,2")


def counts(example: str) -> Callable[[str], list[int]]:
    """Return a reader of different whole numbers above 0, such as `example`, in rising order."""
    expected = f"whole numbers of at least 1, e.g. {example}"

    def read(text: str) -> list[int]:
        numbers = sorted(set(_listed(text, whole, expected)))
        if numbers[0] < 1:
            raise ValueError(expected)
        return numbers

    return read


def _listed(text: str, read: Callable[[str], T], expected: str) -> list[T]:
    try:
        return [read(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(expected) from None
