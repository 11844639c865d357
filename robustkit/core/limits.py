"""Ranges of numbers in the types of fields, as in `Annotated[int, Limits(1, 8)]`. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Messages do not name upper limits from here on: they only guard against typing errors.
MAX_STATED_LIMIT = 1_000_000


@dataclass(frozen=True)
class Limits:
    """The numbers from `low` to `high`; `open` names the ends that are excluded: `low`, `high` or `both`."""

    low: float
    high: float = math.inf
    open: str = ""

    def __contains__(self, number: float) -> bool:
        above = number > self.low if self.open in ("low", "both") else number >= self.low
        below = number < self.high if self.open in ("high", "both") else number <= self.high
        return above and below

    def __str__(self) -> str:
        if not self.open and self.high < math.inf:
            return f"from {self.low} to {self.high}"
        lower, upper = self._ends
        return lower if self.high == math.inf else f"{lower} and {upper}"

    def fault(self, number: float) -> str | None:
        """Return what a number outside the range must be, for a message; None if it is inside."""
        if number in self:
            return None
        lower, upper = self._ends
        if self.high < MAX_STATED_LIMIT:
            return str(self)
        return lower if number <= self.low else upper

    @property
    def _ends(self) -> tuple[str, str]:
        above = "above" if self.open in ("low", "both") else "at least"
        below = "below" if self.open in ("high", "both") else "at most"
        return f"{above} {self.low}", f"{below} {self.high}"
