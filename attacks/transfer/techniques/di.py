"""Input diversity (Xie et al. 2019, arXiv:1803.06978): each gradient is taken at shrunk and shifted images.

The paper enlarges 299 pixels to between 299 and 330 and pads to 330; most nets resize this to their own size
again. Here the images are shrunk to between `ratio` of their size and one pixel less, and padded to their size,
which has the same effect and suits any size. Size and position are drawn for each image; common code draws one for
the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustkit.attack_api import Oracle, Rows, Technique, TransformedOracle, split_rng
from robustkit.core.shapes import Images
from robustkit.core.threat import per_row
from robustkit.registry import recipe, technique
from robustkit.registry.ranges import PositiveShare, Share


@recipe("di-fgsm", paper="arXiv:1803.06978")
def di_fgsm() -> str:
    """Iterative gradient sign at diverse inputs."""
    return "i-fgsm+di"


@technique("di", paper="arXiv:1803.06978")
@dataclass(frozen=True, slots=True)
class DI(Technique):
    """With probability `p` shrinks an image, to no less than `ratio`, and pads it with zeros; costs nothing."""

    p: Share = 0.5
    ratio: PositiveShare = 0.9

    def wrap(self, inner: Oracle) -> Oracle:
        """Return an oracle that takes the gradient at diverse images."""
        return TransformedOracle(inner, "di", 1, self._transform)

    def _transform(self, rows: Rows, x: Images, number: int) -> Images:
        chance, scale, top, left = split_rng(rows, "di", number).rng.uniform(4).to(x).unbind(1)
        high = placing(x.shape[2], self.ratio, scale, top)
        wide = placing(x.shape[3], self.ratio, scale, left)
        moved = high[:, None] @ x @ wide[:, None].transpose(2, 3)
        return torch.where(per_row(chance < self.p, x), moved, x)


def placing(length: int, ratio: float, scale: Tensor, offset: Tensor) -> Tensor:
    """Return the matrices (B L L) that shrink a line of pixels and pad it with zeros on both sides.

    Each row has two weights that sum to 1, as in bilinear resizing, or none. `scale` and `place` (B): in [0, 1).
    """
    least = max(1, int(ratio * length))
    size = (least + (scale * (length - least)).floor())[:, None]
    start = (offset[:, None] * (length + 1 - size)).floor()
    pixel = torch.arange(length, dtype=scale.dtype, device=scale.device)
    local = pixel[None, :] - start
    source = ((local + 0.5) * length / size - 0.5).clamp(0, length - 1)
    weight = (1 - (source[:, :, None] - pixel).abs()).clamp(min=0)
    return weight * ((local >= 0) & (local < size))[:, :, None]
