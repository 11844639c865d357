"""Of a random model: on from a point where it is wrong more often than not to one where it is wrong more often.

A search for the majority ends at the first such point, whose mean share of right draws may be just below one half.
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
# Of eps: the first step's size; the others fall along a cosine.
LARGEST_STEP = 0.25
# In l1, the share of coordinates that a step is spread over.
DENSITY = 0.02
# Of views: means over draws, the likeliest to lead on first.
AVERAGED = ("averaged-mean-logit", "averaged-mended")


def choose_eot_view(view: str, views: Collection[str]) -> str:
    """Return the view to go on by from where an attack on a view has come; without one, the model itself."""
    wanted = (view if view.startswith("averaged-") else "", *AVERAGED)
    return next((name for name in wanted if name in views), "")


def refine_with_eot(
    model: Callable[[Images], Tensor], x: Images, labels: Labels, point: Images, threat: ThreatModel
) -> Images:
    """Return points (B C H W) in the threat around x, on from these by the gradient of the cross-entropy.

    `model` gives logits (B K): the mean of several draws.
    """

    def gradient(number: int, point: Images) -> Images:
        return query(model, point, Goal(labels), "ce").gradient

    def step(number: int, point: Images, gradient: Images) -> Images:
        size = LARGEST_STEP * threat.radius * 0.5 * (1 + math.cos(math.pi * number / STEPS))
        return threat.retract(threat.step(point, gradient, size, density=DENSITY), x)

    return drive(point, STEPS, gradient, step)
