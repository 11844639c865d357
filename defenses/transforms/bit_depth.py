"""Fewer bits per channel before the net (Xu et al. 2018, feature squeezing, arXiv:1704.01155).

Rounding has a gradient of zero and no surrogate, which the checks report.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from robustkit.attack_api import Model
from robustkit.core.limits import Limits
from robustkit.core.shapes import Images, Logits
from robustkit.registry import defense


@defense("bit-depth", paper="arXiv:1704.01155")
@dataclass(frozen=True, slots=True)
class BitDepth:
    """Rounds each value to the nearest of 2^bits levels from 0 to 1, for 1 to 8 bits."""

    bits: Annotated[int, Limits(1, 8)] = 4

    def __call__(self, model: Model, x: Images) -> Logits:
        """Return the model's logits (B K) of the rounded images."""
        steps = 2**self.bits - 1
        return model((x.clamp(0, 1) * steps).round() / steps)
