"""The suite for minimum norms: what `auto` stands for where a threat asks for the nearest point of all."""

from __future__ import annotations

from robustkit.registry import suite


@suite("minimum-norm")
def minimum_norm(norm: str) -> list[str]:
    """The nearest adversarial point of each image: searches in turn, each from where those before it came."""
    return ["fmn(steps=200)", "fab-t(steps=50,targets=3)", *(["ddn(steps=200)"] if norm == "l2" else [])]
