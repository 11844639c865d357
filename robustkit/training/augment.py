"""Augmentation of whole batches with one gather: random crops and horizontal flips."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from robustkit.core.errors import did_you_mean
from robustkit.data.strings import DataString

CROP, FLIP = "crop", "flip"
CHOICES = {"none": (), "crop": (CROP,), "crop-flip": (CROP, FLIP)}
# Data sets whose labels are not preserved by a horizontal flip.
UNMIRRORED = ("svhn",)


def default_augmentation(data: str, channels: int, height: int) -> str:
    """Return the default for these images: crop and flip for photographs, none for grey or small images."""
    if channels == 1 or height < 24:
        return "none"
    return "crop" if DataString.parse(data).name in UNMIRRORED else "crop-flip"


def components(name: str) -> tuple[str, ...]:
    """Return the transforms of an augmentation by its name; UsageError for an unknown name."""
    if name not in CHOICES:
        raise did_you_mean("augmentation", name, CHOICES)
    return CHOICES[name]


def max_shift(height: int) -> int:
    """Return by how many pixels a crop is shifted at most: an eighth of the height, so 4 of 32."""
    return max(height // 8, 1)


def apply_moves(pixels: Tensor, down: Tensor, across: Tensor, mirrored: Tensor, most: int) -> Tensor:
    """Return each image shifted on a black background, and then mirrored or not.

    Args:
        pixels: (B H W C).
        down: (B), vertical offset of the crop in the padded image, 0 to 2 `most`; `most` is no shift.
        across: (B), horizontal offset, with the same range.
        mirrored: (B), whether the image is flipped horizontally.
        most: the largest shift in either direction, in pixels.
    """
    batch, height, width, _ = pixels.shape
    padded = F.pad(pixels, (0, 0, most, most, most, most))
    rows = torch.arange(height, device=pixels.device) + down[:, None]
    columns = torch.arange(width, device=pixels.device)
    columns = torch.where(mirrored[:, None], width - 1 - columns, columns) + across[:, None]
    which = torch.arange(batch, device=pixels.device)
    return padded[which[:, None, None], rows[:, :, None], columns[:, None, :]]


def undo_moves(pixels: Tensor, down: Tensor, across: Tensor, mirrored: Tensor, most: int) -> Tensor:
    """Return the inverse of `apply_moves`; 0 where a pixel was cropped away."""
    back = torch.where(mirrored, across, 2 * most - across)
    return apply_moves(pixels, 2 * most - down, back, mirrored, most)
