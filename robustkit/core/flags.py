"""Results of checks: a reason to doubt a result, or what was measured if there is none. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from robustkit.core.schema import OneOf

LEVELS = ("info", "warning", "error")
OK, UNMEASURED = "ok", "not measured"


@dataclass(frozen=True)
class Flag:
    """The result of a check.

    Args:
        code: the name of the check.
        level: `info`, `warning` or `error` for a reason to doubt the result; otherwise `ok` or `not measured`.
        value: the measured value, if there is one.
        meaning: what was found.
        remedy: what to do about it.
    """

    code: str
    level: Annotated[str, OneOf(*LEVELS, OK, UNMEASURED)]
    value: float | None
    meaning: str
    remedy: str

    @property
    def raised(self) -> bool:
        """Whether the check found a reason to doubt the result."""
        return self.level in LEVELS

    @property
    def warns(self) -> bool:
        """Whether the reason makes the result of the run unreliable."""
        return self.level in ("warning", "error")


def passed(code: str, value: int | float | None, meaning: str) -> Flag:
    """Return the result of a check that found no problem."""
    return Flag(code, OK, value, meaning, "nothing to do")


def unmeasured(code: str, meaning: str, remedy: str) -> Flag:
    """Return the result of a check that could not be made."""
    return Flag(code, UNMEASURED, None, meaning, remedy)
