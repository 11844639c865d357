"""The length of the steps of attacks, techniques and training methods, with its unit.

`0.25eps` is a share of the threat's eps. `2/255px` is a length in pixel units of [0, 1], measured in the
threat's norm. A bare number is a share of eps. It is refused if it is more likely meant in pixel units: if it
is written over 255 or 256, is a float equal to a number of grey levels, is so small that all steps together do
not reach from the image to the edge of the ball, or so large that one step crosses the ball.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from robustkit.core.errors import UsageError
from robustkit.core.numbers import exact

UNITS = ("eps", "px")
# N steps of 1 / N may reach slightly less than 1 by rounding.
REACH_TOLERANCE = 1e-6
# A step of this many eps crosses the ball.
MAX_USEFUL_EPS = 2
# Denominators of grey levels over 255 that are unlikely for a share of eps (17 / 255 is 1 / 15).
_LEVELS = (51, 85, 255)


@dataclass(frozen=True)
class StepSize:
    """The length of a step: `number` times eps, or `number` itself with the unit `px`.

    Args:
        number: above 0.
        unit: `eps`, or `px` for pixel units of [0, 1] in the threat's norm.

    Raises:
        UsageError: for a number of 0 or below, or another unit.
    """

    number: float
    unit: str = "eps"

    def __post_init__(self) -> None:
        """Refuse lengths that are not above 0, and unknown units."""
        if not 0 < self.number < math.inf or self.unit not in UNITS:
            raise UsageError(
                f"step_size={self.number:g}{self.unit} must be above 0; write it with a unit, "
                "e.g. 0.25eps or 2/255px."
            )

    @classmethod
    def read(cls, value: object) -> StepSize:
        """Return the step size that a text such as `2/255px` or `0.25eps`, or a bare number, means.

        Raises:
            ValueError: if it is no number.
            UsageError: if it is not above 0.
        """
        if isinstance(value, StepSize):
            return value
        number, unit = _split(value)
        return cls(float(exact(number)), unit or "eps")

    def length(self, eps: float) -> float:
        """Return the length in pixel units at an eps."""
        return self.number * eps if self.unit == "eps" else self.number

    def share(self, eps: float) -> float:
        """Return the length as a share of an eps; 0 if eps is 0."""
        return self.number if self.unit == "eps" else self.number / eps if eps else 0.0

    @property
    def record(self) -> float | str:
        """The value in records: a bare number is a share of eps."""
        return self.number if self.unit == "eps" else str(self)

    def __str__(self) -> str:
        short, near = f"{self.number:.6g}", Fraction(self.number).limit_denominator(10_000)
        if float(short) == self.number:
            return f"{short}{self.unit}"
        return f"{near if float(near) == self.number else repr(self.number)}{self.unit}"


def check_bare(name: str, value: object, steps: int | None) -> None:
    """Refuse a bare number that is more likely meant in pixel units than as a share of eps.

    Args:
        name: name of the attack or method, for the message.
        value: as it was written.
        steps: how many such steps there are, if they lead from the image to the edge of the ball.

    Raises:
        UsageError: with both ways to write it.
    """
    if isinstance(value, StepSize) or _split(value)[1]:
        return
    share = float(exact(value))
    reach = None if steps is None else steps * share
    if _in_levels(value) or (reach is not None and reach < 1 - REACH_TOLERANCE) or share >= MAX_USEFUL_EPS:
        text = value.strip() if isinstance(value, str) else f"{share:.6g}"
        total = "" if steps is None else f", and {steps} steps of it reach {reach:.3g} of eps"
        pixels = f"{text}/255px" if share >= MAX_USEFUL_EPS else f"{text}px"
        raise UsageError(
            f"{name}: step_size={text} has no unit, so it would be a share of eps{total}; "
            f"write step_size={pixels} for pixel units of [0, 1], or {text}eps for a share of eps."
        )


def check_pixels(name: str, size: object, norm: str) -> None:
    """Refuse a step in linf that is longer than the range of pixel values, as if 8-bit levels were meant.

    Raises:
        UsageError: with the spelling for 8-bit levels.
    """
    if norm == "linf" and isinstance(size, StepSize) and size.unit == "px" and size.number > 1:
        raise UsageError(
            f"{name}: step_size={size} is longer than the range of pixel values, [0, 1]; "
            f"write step_size={size.number:.6g}/255px if 8-bit levels are meant."
        )


def _in_levels(value: object) -> bool:
    """Return whether a bare number is written over 255 or 256, or is a float equal to k / 255."""
    if isinstance(value, str):
        return bool(re.search(r"/\s*25[56](\.0*)?$", value.strip()))
    near = Fraction(float(exact(value))).limit_denominator(max(_LEVELS))
    return near.denominator in _LEVELS and float(near) == float(exact(value))


def _split(value: object) -> tuple[object, str]:
    """Return a value without its unit, and the unit, empty if it has none."""
    if isinstance(value, str):
        text = value.strip()
        for unit in UNITS:
            if text.lower().endswith(unit):
                return text[: -len(unit)], unit
    return value, ""
