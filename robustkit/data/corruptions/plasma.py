"""Clouds by the diamond-square algorithm, one for each image."""

from __future__ import annotations

import torch
from torch import Tensor

from robustkit.core.rng import RowRng


def clouds(rng: RowRng, height: int, width: int, decay: float) -> Tensor:
    """Return a random height map in [0, 1] for each row of the generator (B, height, width).

    Args:
        rng: one generator for each image.
        height: in pixels.
        width: in pixels.
        decay: by what the roughness is divided from one level to the next finer one; larger is smoother.
    """
    size = 1 << (max(height, width, 2) - 1).bit_length()
    field = torch.zeros(len(rng.ids), size, size, dtype=torch.float64)
    stride, rough, level = size, 100.0, 1000

    def filled(corners: Tensor) -> Tensor:
        nonlocal level
        level += 1
        drawn = rng.at(step=level).uniform(*corners.shape[1:]).double() * 2 - 1
        return corners / 4 + rough * rough * drawn

    while stride >= 2:
        half = stride // 2
        corner = field[:, ::stride, ::stride]
        square = corner + corner.roll(-1, 1)
        field[:, half::stride, half::stride] = filled(square + square.roll(-1, 2))
        centre, corner = field[:, half::stride, half::stride], field[:, ::stride, ::stride]
        upright = centre + centre.roll(1, 1) + corner + corner.roll(-1, 2)
        flat = centre + centre.roll(1, 2) + corner + corner.roll(-1, 1)
        field[:, ::stride, half::stride] = filled(upright)
        field[:, half::stride, ::stride] = filled(flat)
        stride, rough = half, rough / decay
    field -= field.amin((1, 2), keepdim=True)
    return (field / field.amax((1, 2), keepdim=True)).float()[:, :height, :width]
