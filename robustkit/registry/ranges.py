"""Ranges of the fields of attacks, defenses and methods, written as their types: `steps: Count = 40`.

A field of particular limits writes them itself: `bits: Annotated[int, Limits(1, 8)] = 4`. Imports no torch.
"""

from __future__ import annotations

from typing import Annotated, Any

from robustkit.core.limits import MAX_STATED_LIMIT, Limits

Count = Annotated[int, Limits(1, MAX_STATED_LIMIT)]
CountOrZero = Annotated[int, Limits(0, MAX_STATED_LIMIT)]
Positive = Annotated[float, Limits(0, open="low")]
NonNegative = Annotated[float, Limits(0)]
Share = Annotated[float, Limits(0, 1)]
PositiveShare = Annotated[float, Limits(0, 1, open="low")]
ShareBelowOne = Annotated[float, Limits(0, 1, open="high")]

# By their names, to read them in a source text.
NAMED: dict[str, Any] = {
    "Count": Count,
    "CountOrZero": CountOrZero,
    "Positive": Positive,
    "NonNegative": NonNegative,
    "Share": Share,
    "PositiveShare": PositiveShare,
    "ShareBelowOne": ShareBelowOne,
}
