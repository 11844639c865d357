"""Suites for models without gradients: by scores, and by predicted labels alone."""

from __future__ import annotations

from robustkit.core.errors import UsageError
from robustkit.registry import suite

BY_LABELS = {"linf": "rays(queries=10000)", "l2": "hop-skip-jump(queries=10000)"}


@suite("blackbox-scores")
def blackbox_scores(norm: str) -> list[str]:
    """Square with 5,000 queries, then twice more from other starts on the images that are left."""
    return ["square(queries=5000)", "square(queries=5000,restarts=2)"]


@suite("blackbox-labels")
def blackbox_labels(norm: str) -> list[str]:
    """Attacks that use nothing but predicted labels, with 10,000 queries: RayS in linf, HopSkipJump in l2."""
    if norm not in BY_LABELS:
        raise UsageError(f"there is no attack by labels in {norm}; write a threat in {' or '.join(BY_LABELS)}.")
    return [BY_LABELS[norm]]
