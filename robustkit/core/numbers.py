"""Exact reading of numbers that users write; texts that are too long or too large are refused."""

from __future__ import annotations

import math
import numbers
import re
from fractions import Fraction

# Limits of texts, and of the digits of exponents and fractions: the exact fraction of 1e999999999 would fill the
# memory. A fraction within the limits can be written and read again.
MAX_LENGTH = 150
MAX_DIGITS = 60

_DECIMAL = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE]([+-]?\d+))?", re.ASCII)


def shown(value: object) -> str:
    """Return a value as text for a message, shortened if it is long."""
    text = repr(value) if _short(value) else f"a whole number of more than {MAX_DIGITS} digits"
    return text if len(text) <= MAX_LENGTH else f"{text[:MAX_DIGITS]}…{text[-1]}"


def _short(value: object) -> bool:
    """Return whether a value can be converted to text: Python refuses integers of thousands of digits."""
    return not isinstance(value, int) or abs(value) < 10**MAX_DIGITS


def exact(value: object) -> Fraction:
    """Return a number as an exact fraction: `8/255`, `0.3/255`, `1e-2`, or a number of Python or numpy.

    A float is converted by its shortest decimal representation.

    Raises:
        ValueError: saying what is wrong with it, as the end of a sentence.
    """
    if isinstance(value, Fraction):
        return value
    if isinstance(value, bool) or not isinstance(value, (str, numbers.Real)):
        raise ValueError("is not a number")
    if isinstance(value, str):
        number = _written(value.strip())
    elif isinstance(value, numbers.Rational):
        number = Fraction(value)
    elif math.isfinite(value):
        number = Fraction(repr(float(value)))
    else:
        raise ValueError("is not a finite number")
    if max(abs(number.numerator), number.denominator) > 10**MAX_DIGITS:
        raise ValueError(f"has more than {MAX_DIGITS} digits")
    return number


def _written(text: str) -> Fraction:
    if len(text) > MAX_LENGTH:
        raise ValueError(f"has more than {MAX_LENGTH} characters")
    parts = [_DECIMAL.fullmatch(part.strip()) for part in text.split("/")]
    if len(parts) > 2 or not all(parts):
        raise ValueError("is not a number")
    for part in parts:
        if part and abs(int(part[1] or 0)) > MAX_DIGITS:
            raise ValueError(f"has an exponent beyond {MAX_DIGITS}")
    upper, *lower = (Fraction(part[0]) for part in parts if part)
    if lower == [0]:
        raise ValueError("divides by zero")
    return upper / lower[0] if lower else upper


def whole(value: object) -> int:
    """Return a whole number: `7`, 7, 7.0, or one of numpy's; `7.0` and `1e3` in a text are refused.

    Raises:
        ValueError: saying what is wrong with it, as the end of a sentence.
    """
    if isinstance(value, str) and not re.fullmatch(r"[+-]?\d+", value.strip(), re.ASCII):
        raise ValueError("is not a whole number")
    number = exact(value)
    if number.denominator != 1:
        raise ValueError("is not a whole number")
    return int(number)


def share(value: object) -> float:
    """Return a share from 0 to 1: `0.002`, `1/500`, `0.2 %`, or one of Python's or numpy's numbers.

    Raises:
        ValueError: saying what is wrong with it, as the end of a sentence.
    """
    percent = isinstance(value, str) and value.strip().endswith("%")
    number = exact(str(value).strip()[:-1]) / 100 if percent else exact(value)
    if not 0 <= number <= 1:
        raise ValueError("is not a share from 0 to 1")
    return float(number)
