"""A sentence about a run that was resumed with other versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def made_in_parts(environment: Mapping[str, Any]) -> str:
    """Return which versions computed which part of a run; empty if one version computed all."""
    parts = environment.get("parts") or []
    if len(parts) < 2:
        return ""
    first, *later = (f"robustkit {part.get('robustkit')} with torch {part.get('torch')}" for part in parts)
    starts = [part.get("from") for part in parts[1:]]
    return f"computed by different versions: {first}" + "".join(
        f", from {start} on {name}" for start, name in zip(starts, later, strict=True)
    )
