"""Checks of the fields of samplers."""

from __future__ import annotations

from robustkit.core.errors import UsageError


def check_count(name: str, field: str, count: int, steps: int) -> None:
    """Refuse more samples than there are steps."""
    if count > steps:
        raise UsageError(f"{name}: {field}={count} is more than the {steps} steps for it; write more --epochs.")
