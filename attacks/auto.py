"""The attack that `robustkit craft` takes when none is named."""

from __future__ import annotations

from robustkit.registry import recipe


@recipe("auto", paper="arXiv:1710.06081")
def auto() -> str:
    """The momentum method in ten steps of a fifth of eps."""
    return "mi-fgsm(steps=10,step_size=0.2)"
