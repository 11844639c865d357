"""The suite for masked gradients: attacks on differentiable views of the model, judged on the model itself.

A model has views if it masks its gradient, draws random numbers, or is an ensemble
(`robustkit.gradient_views.views`); attacks on views are skipped for a model without views. Averaged gradients are
those of Athalye et al. 2018 (arXiv:1802.00420).
"""

from __future__ import annotations

from robustkit.attacks.suites import ensemble
from robustkit.registry import DRAWN, find, suite

MASKED = ("mended", "loosened", "inner-logits", "fitted", "calm", "frozen")


@suite("adaptive", paper="arXiv:1802.00420")
def adaptive(norm: str) -> list[str]:
    """`rapid`, then every view of the model, then score-based attacks, from the best point and from scratch."""
    return [*find("suite", "rapid")(norm), *entries(norm)]


def entries(norm: str) -> list[str]:
    """Return the attacks that come after `rapid`."""
    own = "apgd(loss=margin,steps=30,restarts=1,large_start=false)@own"
    soft = "apgd(loss=margin,steps=20,restarts=1,large_start=false)@soft-top-k"
    masked = [attack for view in MASKED for attack in ensemble.climb(norm, view)]
    return [
        *(f"apgd(loss=ce,steps=40,restarts=1)@averaged-{view}" for view in DRAWN),
        own,
        *masked,
        *ensemble.entries(norm),
        soft,
        *ensemble.climb(norm, "smooth"),
        "square(queries=1000,p_init=0.05,refine=true)",
        "square(queries=5000,patience=500,rivalry=0.5)",
    ]
