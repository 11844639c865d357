"""The attack that `robustkit craft` takes when none is named.

Chosen on 192 CIFAR-10 test images from the thousandth on, within 80 gradients of four surrogates, one of them
adversarially trained: see docs/transfer.md.
"""

from __future__ import annotations

from robustkit.registry import recipe


@recipe("auto", paper="docs/transfer.md")
def auto() -> str:
    """The momentum method at diverse inputs, each surrogate weighed by what is at stake at it."""
    return "mi-fgsm(steps=20,step_size=0.2)+triage+di"
