"""Block shuffle and rotation (Wang et al. 2024, arXiv:2308.10299): the mean gradient over rearranged images.

As in the paper each block is rotated about its own centre; the authors' code rotates whole strips before it cuts
them again. On a GPU the order of the sums in the backward pass is not fixed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from robustkit.attack_api import Oracle, Rows, Technique, TransformedOracle, split_rng
from robustkit.core.limits import Limits
from robustkit.core.shapes import Images
from robustkit.registry import technique
from robustkit.registry.ranges import Count


@technique("block-shuffle", paper="arXiv:2308.10299")
@dataclass(frozen=True, slots=True)
class BlockShuffle(Technique):
    """Shuffles and rotates `blocks` blocks of each of `blocks` strips of the image; costs `copies` gradients.

    Blocks have random sizes and are rotated by up to `degrees`; pixels that a rotated block does not cover are
    zero.
    """

    copies: Count = 20
    blocks: Annotated[int, Limits(1, 64)] = 2
    degrees: Annotated[float, Limits(0, 180)] = 24.0

    @property
    def cost(self) -> int:
        """The cost in gradients: one a copy."""
        return self.copies

    def wrap(self, inner: Oracle) -> Oracle:
        """Return an oracle that takes the gradient at each arrangement."""
        return TransformedOracle(inner, "block-shuffle", self.copies, self._transform)

    def _transform(self, rows: Rows, x: Images, number: int) -> Images:
        (height, width), n = x.shape[2:], self.blocks
        draws = split_rng(rows, "block-shuffle", number).rng.uniform(n * (2 + 3 * n)).to(x)
        across, down, turns = torch.split(draws, [2 * n, 2 * n * n, n * n], 1)
        strip, column = _cut(width, across.view(-1, 2, n))
        block, row = _cut(height, down.reshape(-1, 2, n))
        # Of each pixel (B H W): its strip, then its block in the strip's own cut.
        strip = strip[:, None, :].expand(-1, height, -1)
        block, *row = (part.view(-1, n, height).transpose(1, 2).gather(2, strip) for part in (block, *row))
        column = [part[:, None, :].expand(-1, height, -1) for part in column]
        angle = (2 * turns - 1).gather(1, (strip * n + block).flatten(1)).view_as(row[0]) * math.radians(
            self.degrees
        )
        down_by, right_by = row[0], column[0]
        source_down = angle.cos() * down_by - angle.sin() * right_by
        source_right = angle.sin() * down_by + angle.cos() * right_by
        bare = (source_down.abs() > row[2] / 2) | (source_right.abs() > column[2] / 2)
        target = [
            # Inside the block, so that its neighbours in the image do not appear at its edge.
            middle + offset.clamp(min=-(size - 1) / 2, max=(size - 1) / 2)
            for offset, (_, middle, size) in ((source_right, column), (source_down, row))
        ]
        grid = [2 * index / max(length - 1, 1) - 1 for index, length in zip(target, (width, height), strict=True)]
        moved = F.grid_sample(x, torch.stack(grid, 3), padding_mode="border", align_corners=True)
        return torch.where(bare[:, None], 0, moved)


def _cut(length: int, draws: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Cut lines of pixels at random and shuffle the pieces.

    Args:
        length: of the lines.
        draws: from [0, 1), (R, 2, n): for the sizes of the pieces and for their order.

    Returns:
        For each pixel of the new lines, (R L): which piece it is of; its distance from the piece's middle, that
        middle in the old line, and the piece's size.
    """
    sizes, order = draws[:, 0], draws[:, 1].argsort(1)
    ends = (length * sizes.cumsum(1) / sizes.sum(1, keepdim=True).clamp(min=1e-6)).round()
    ends[:, -1] = length
    size = ends.diff(dim=1, prepend=torch.zeros_like(ends[:, :1]))
    middle = ends - (size + 1) / 2
    new_ends = size.gather(1, order).cumsum(1)
    pixel = torch.arange(length, dtype=draws.dtype, device=draws.device)
    index = (pixel[None, :, None] >= new_ends[:, None, :]).sum(2)
    piece = order.gather(1, index)
    own_size = size.gather(1, piece)
    local = pixel - (new_ends.gather(1, index) - own_size)
    return piece, [local - (own_size - 1) / 2, middle.gather(1, piece), own_size]
