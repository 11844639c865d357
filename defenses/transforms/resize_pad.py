"""Random resizing and padding before the net (Xie et al. 2018, arXiv:1711.01991).

The paper draws one size and one position per batch; here they are drawn per image, so that the images of a
batch are independent. Sizes and interpolation (nearest) are those of the authors' code, positions those of the
paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch

from robustkit.attack_api import Model
from robustkit.core.limits import Limits
from robustkit.core.shapes import Images, Logits
from robustkit.registry import defense


@defense("resize-pad", paper="arXiv:1711.01991")
@dataclass(frozen=True, slots=True)
class ResizePad:
    """Enlarges each image to a random size, at a random position of a black image that is `ratio` times as large.

    The net gets the larger image, unless the model string has a `size`. A ratio of 1 changes nothing. The ratio of
    the paper is 331/299.
    """

    ratio: Annotated[float, Limits(1, 2)] = 331 / 299

    def __call__(self, model: Model, x: Images) -> Logits:
        """Return the model's logits (B K) of the padded images."""
        share = torch.rand(len(x), device=x.device)
        down, right = (_axis(length, self.ratio, share).to(x.dtype) for length in x.shape[2:])
        return model(down[:, None] @ x @ right[:, None].mT)


def _axis(length: int, ratio: float, share: torch.Tensor) -> torch.Tensor:
    """Return for each image the matrix (B out in) that moves its pixels along one axis to their new positions.

    Each row of a matrix selects one pixel, or none in the border. Its gradient is exact, and deterministic on a
    GPU.

    Args:
        length: pixels along the axis.
        ratio: size of the black image relative to `length`.
        share: random numbers (B) in [0, 1) that determine the size of each image, the same for both axes.
    """
    out = round(length * ratio)
    size = length + (share * (out - length)).long()
    offset = (torch.rand_like(share) * (out - size + 1)).long()
    ahead = torch.arange(out, device=share.device) - offset[:, None]
    source = torch.div(ahead * length, size[:, None], rounding_mode="floor")
    return source[:, :, None] == torch.arange(length, device=share.device)
