"""What the fields of a sampler may be."""

from __future__ import annotations

from robustkit.errors import UsageError


def at_least(name: str, bound: float, **values: float) -> None:
    """Refuse values below a bound, and NaN; `name` is the method's."""
    for field, value in values.items():
        if not value >= bound:
            raise UsageError(f"{name}: {field}={value} must be at least {bound}.")


def below(name: str, bound: float, **values: float) -> None:
    """Refuse values that are not from 0 up to, and less than, a bound."""
    for field, value in values.items():
        if not 0 <= value < bound:
            raise UsageError(f"{name}: {field}={value} must be at least 0 and below {bound}.")


def enough(name: str, field: str, count: int, steps: int) -> None:
    """Refuse more samples than there are steps to take them at."""
    if count > steps:
        raise UsageError(f"{name}: {field}={count} is more than the {steps} steps for it; write more --epochs.")
