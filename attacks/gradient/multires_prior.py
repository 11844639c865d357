"""The multi-resolution prior (Fort & Lakshminarayanan 2024, arXiv:2408.05446): sums of several resolutions.

The perturbation is a sum of tensors of several resolutions, each enlarged to the image's size. The authors
generate images with it, and each tensor follows its own gradient through bicubic enlarging and a tanh. Here a
tensor follows the mean of the image's gradient over the pixels that it covers, and the sum is projected onto the
threat.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch.nn.functional as F
from torch import Tensor

from robustkit.attack_api import Answer, Rows, RowWise, State
from robustkit.core import criteria
from robustkit.core.errors import UsageError
from robustkit.core.limits import Limits
from robustkit.core.shapes import Images
from robustkit.core.step_size import StepSize
from robustkit.core.threat import per_row
from robustkit.registry import attack
from robustkit.registry.ranges import Count, CountOrZero

# The largest linf norm of a sum, in multiples of eps, before it is scaled back; points are clipped to eps.
MAX_SUM_EPS = 3.0


@attack("multires-prior", paper="arXiv:2408.05446", norms=("linf", "l2"), access="gradient", ascent=True)
@dataclass(frozen=True, slots=True)
class MultiResPrior(RowWise):
    """Gradient steps of tensors at `scales` resolutions, each half the one before, from the clean image.

    The first `skip` resolutions, the finest, are not used. `step_size` is a fraction of
    eps: the mean change of a pixel in linf, the length of the change in l2.
    """

    steps: Count = 40
    step_size: StepSize = StepSize(0.1)
    scales: Annotated[int, Limits(1, 16)] = 4
    skip: CountOrZero = 0
    loss: str = "ce"

    def __post_init__(self) -> None:
        """Raise UsageError for an unknown loss, or if no resolution is left."""
        criteria.loss(self.loss)
        if not 0 <= self.skip < self.scales:
            raise UsageError(
                f"multires-prior: skip={self.skip} of scales={self.scales} leaves none; use 0 to "
                f"{self.scales - 1}."
            )

    def init(self, rows: Rows) -> State:
        """Return the clean images, and sums of zero."""
        return {"x": rows.x, "sum": rows.x.new_zeros(rows.x.shape)}

    def step(self, rows: Rows, state: State, answer: Answer) -> State:
        """Return the next points, and the sums whose projections they are."""
        eps = float(rows.threat.eps)
        # Scaled first, so that tiny gradients do not underflow when squared.
        largest = answer.gradient.abs().flatten(1).amax(1)
        unit = answer.gradient / per_row(largest.where(largest > 0, 1), answer.gradient)
        direction = sum(
            (coarse(unit, 2**scale) for scale in range(self.skip, self.scales)), start=unit.new_zeros(())
        )
        whole = state["sum"] + self.step_size.length(eps) * direction / _size(direction, rows.threat.norm)
        if rows.threat.norm == "linf":
            length = whole.abs().flatten(1).amax(1) / MAX_SUM_EPS
        else:
            length = whole.flatten(1).norm(dim=1)
        whole = whole * per_row((eps / length.clamp(min=1e-30)).clamp(max=1), whole)
        return {"x": rows.project(rows.x + whole), "sum": whole}


def coarse(images: Images, factor: int) -> Images:
    """Return images averaged to a resolution smaller by this factor and enlarged to their own size."""
    if factor == 1:
        return images
    height, width = (max(length // factor, 1) for length in images.shape[2:])
    small = F.adaptive_avg_pool2d(images, (height, width))
    return F.interpolate(small, images.shape[2:], mode="bicubic", align_corners=False)


def _size(direction: Tensor, norm: str) -> Tensor:
    """Return the mean absolute coordinate of each row, in l2 its norm; 1 if it is zero."""
    flat = direction.flatten(1)
    size = flat.abs().mean(1) if norm == "linf" else flat.norm(dim=1)
    return per_row(size.where(size > 0, 1), direction)
