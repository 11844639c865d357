"""The suite for minimum norms: what `auto` means for a threat NORM:min."""

from __future__ import annotations

from robustkit.registry import suite


@suite("minimum-norm")
def minimum_norm(norm: str) -> list[str]:
    """The nearest adversarial point of each image: searches in turn, fewer than 2,000 passes an image."""
    return [
        "fmn(steps=100)",
        *(["ddn(steps=100)"] if norm == "l2" else []),
        "shrinking-pgd-t(steps=50,targets=9)",
        f"shrinking-pgd-t(steps=50,targets={3 if norm == 'l2' else 5},start=random)",
        "fab-t(steps=20,targets=1)",
        "shrinking-pgd(steps=100,start=nearest,first_step=0.5)",
    ]
