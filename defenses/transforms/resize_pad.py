"""Random resizing and padding before the net (Xie et al. 2018, arXiv:1711.01991).

The paper draws one size and one place per batch; we draw them per image, so that images of a batch are
independent. Sizes and interpolation (nearest) are those of the authors' code, places those of the paper.
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
    """Each image is enlarged to a random size and put at a random place of a black one, `ratio` times as large.

    The net sees the larger image, unless the model string's `size` brings it back. A ratio of 1 changes nothing.
    The paper's ratio is 331/299.
    """

    ratio: Annotated[float, Limits(1, 2)] = 331 / 299

    def __call__(self, model: Model, x: Images) -> Logits:
        """Return the model's logits of the padded images."""
        share = torch.rand(len(x), device=x.device)
        down, right = (_axis(length, self.ratio, share).to(x.dtype) for length in x.shape[2:])
        return model(down[:, None] @ x @ right[:, None].mT)


def _axis(length: int, ratio: float, share: torch.Tensor) -> torch.Tensor:
    """Return for each row the matrix (B out in) that takes its pixels along one axis to their new places.

    A row of it picks one pixel, or none in the border: a gather whose gradient is exact, and the same every time
    on a GPU. `share` (B) on [0, 1) is the size's place among all sizes, common to both axes.
    """
    out = round(length * ratio)
    size = length + (share * (out - length)).long()
    place = (torch.rand_like(share) * (out - size + 1)).long()
    ahead = torch.arange(out, device=share.device) - place[:, None]
    source = torch.div(ahead * length, size[:, None], rounding_mode="floor")
    return source[:, :, None] == torch.arange(length, device=share.device)
