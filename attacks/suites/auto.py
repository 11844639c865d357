"""The defaults: the attack of `robustkit craft` and the suite of `robustkit evaluate`.

The attack was chosen on 192 CIFAR-10 test images from index 1000 on, with 80 gradients of four surrogates, one of
them adversarially trained: see docs/transfer.md.
"""

from __future__ import annotations

from robustkit.attacks.suites import adaptive
from robustkit.registry import find, recipe, suite


@recipe("auto", paper="docs/transfer.md")
def auto() -> str:
    """The momentum method at diverse inputs, with each surrogate weighted by its margin."""
    return "mi-fgsm(steps=20,step_size=0.2)+triage+di"


@suite("auto")
def suited(norm: str) -> list[str]:
    """`rapid`, and all of `adaptive` if a check or a view of the model makes its result unreliable."""
    return [*find("suite", "rapid")(norm), *(f"{text}?" for text in adaptive.entries(norm))]
