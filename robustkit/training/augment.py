"""Augmentation of whole batches, in one gather: a shifted crop and a mirrored half."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from robustkit.core.errors import did_you_mean
from robustkit.data.strings import DataString

CROP, FLIP = "crop", "flip"
CHOICES = {"none": (), "crop": (CROP,), "crop-flip": (CROP, FLIP)}
# Data whose images mean another thing in a mirror, or are too small to lose an edge.
UNMIRRORED = ("svhn",)


def usual(data: str, channels: int, height: int) -> str:
    """Return what is usual for these images: crop and flip for photographs, nothing for drawings of digits."""
    if channels == 1 or height < 24:
        return "none"
    return "crop" if DataString.parse(data).name in UNMIRRORED else "crop-flip"


def parts(name: str) -> tuple[str, ...]:
    """Return what a choice consists of; UsageError if there is no such choice."""
    if name not in CHOICES:
        raise did_you_mean("augmentation", name, CHOICES)
    return CHOICES[name]


def margin(height: int) -> int:
    """Return by how many pixels a crop may be shifted: 4 of 32."""
    return max(height // 8, 1)


def moved(pixels: Tensor, down: Tensor, across: Tensor, mirrored: Tensor, most: int) -> Tensor:
    """Return each image shifted, with black behind it, and then mirrored or not.

    Args:
        pixels: (B H W C).
        down: (B), by how much from the top, 0 to 2 `most`; `most` is no shift.
        across: (B), likewise from the left.
        mirrored: (B), true or false.
        most: the largest shift either way, in pixels.
    """
    batch, height, width, _ = pixels.shape
    padded = F.pad(pixels, (0, 0, most, most, most, most))
    rows = torch.arange(height, device=pixels.device) + down[:, None]
    columns = torch.arange(width, device=pixels.device)
    columns = torch.where(mirrored[:, None], width - 1 - columns, columns) + across[:, None]
    which = torch.arange(batch, device=pixels.device)
    return padded[which[:, None, None], rows[:, :, None], columns[:, None, :]]


def returned(pixels: Tensor, down: Tensor, across: Tensor, mirrored: Tensor, most: int) -> Tensor:
    """Return what `moved` moved where it was; 0 where that lay outside."""
    back = torch.where(mirrored, across, 2 * most - across)
    return moved(pixels, 2 * most - down, back, mirrored, most)
