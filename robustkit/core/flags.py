"""What checks say of a number: a reason to look twice, or what was measured where there is none. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from robustkit.core.schema import OneOf

LEVELS = ("info", "warning", "error")
OK, UNMEASURED = "ok", "not measured"


@dataclass(frozen=True)
class Flag:
    """A reason to look twice at a number, or what a check has to say where it found none.

    `level` is `info`, `warning` or `error`, and without a reason `ok` or `not measured`; `value` is what was
    measured.
    """

    code: str
    level: Annotated[str, OneOf(*LEVELS, OK, UNMEASURED)]
    value: float | None
    meaning: str
    remedy: str

    @property
    def raised(self) -> bool:
        """Whether it is a reason to look twice."""
        return self.level in LEVELS

    @property
    def warns(self) -> bool:
        """Whether it puts the run's number in doubt."""
        return self.level in ("warning", "error")


def passed(code: str, value: int | float | None, meaning: str) -> Flag:
    """Return what a check measured that found nothing."""
    return Flag(code, OK, value, meaning, "nothing to do")


def unmeasured(code: str, meaning: str, remedy: str) -> Flag:
    """Return why a check could not be made."""
    return Flag(code, UNMEASURED, None, meaning, remedy)
