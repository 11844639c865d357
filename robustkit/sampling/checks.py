"""What the fields of a sampler may be."""

from __future__ import annotations

from robustkit.core.errors import UsageError


def check_count(name: str, field: str, count: int, steps: int) -> None:
    """Refuse more samples than there are steps to take them at."""
    if count > steps:
        raise UsageError(f"{name}: {field}={count} is more than the {steps} steps for it; write more --epochs.")
