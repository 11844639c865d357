"""For random models: refine an adversarial point by EOT gradient steps so that it fools a larger share of draws.

A search for the majority ends at the first adversarial point, whose share of right draws may be just below half.
The gradient is that of the mean over draws (expectation over transformation, arXiv:1802.00420).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

from torch import Tensor

from robustkit.attack_api import query
from robustkit.attack_api.driver import drive
from robustkit.core.criteria import Goal
from robustkit.core.shapes import Images, Labels
from robustkit.core.threat import ThreatModel

STEPS = 20
# The first step as a share of eps; the others fall along a cosine.
FIRST_STEP = 0.25
# In l1, the share of coordinates that a step changes.
DENSITY = 0.02
# Views that are means over draws, in order of preference.
AVERAGED = ("averaged-mean-logit", "averaged-mended")


def choose_eot_view(view: str, views: Collection[str]) -> str:
    """Return the view whose gradients refine the points of an attack on a view; "" is the model itself."""
    wanted = (view if view.startswith("averaged-") else "", *AVERAGED)
    return next((name for name in wanted if name in views), "")


def refine_with_eot(
    model: Callable[[Images], Tensor], x: Images, labels: Labels, point: Images, threat: ThreatModel
) -> Images:
    """Return points refined by gradient steps on the cross-entropy.

    Args:
        model: returns the mean logits (B K) of several draws.
        x: clean images (B C H W).
        labels: of these (B).
        point: adversarial images (B C H W) to start from.
        threat: the threat, which the points stay in.
    """

    def gradient(number: int, point: Images) -> Images:
        return query(model, point, Goal(labels), "ce").gradient

    def step(number: int, point: Images, gradient: Images) -> Images:
        size = FIRST_STEP * threat.radius * 0.5 * (1 + math.cos(math.pi * number / STEPS))
        return threat.retract(threat.step(point, gradient, size, density=DENSITY), x)

    return drive(point, STEPS, gradient, step)
