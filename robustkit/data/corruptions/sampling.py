"""Reads images between pixels, and blurs them with Gaussians: shared by several corruptions."""

from __future__ import annotations

import math

import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from robustkit.core.shapes import Images


def sample(x: Images, rows: Tensor, columns: Tensor, outside: str = "reflection") -> Images:
    """Return images read at fractional pixel positions, by bilinear interpolation.

    Args:
        x: images (B, C, H, W).
        rows: positions (B, H', W') from above in pixels, 0 at the centre of the first pixel.
        columns: positions from the left (B, H', W').
        outside: what lies beyond the edge, as in `torch.nn.functional.grid_sample`.

    Returns:
        Images (B, C, H', W').
    """
    height, width = x.shape[2:]
    grid = torch.stack([_unit(columns, width), _unit(rows, height)], 3)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode=outside, align_corners=True)


def _unit(positions: Tensor, size: int) -> Tensor:
    return positions * (2 / max(size - 1, 1)) - 1


def pixel_grid(x: Images) -> tuple[Tensor, Tensor]:
    """Return the row and the column of each pixel (H, W), float32."""
    height, width = x.shape[2:]
    rows = torch.arange(height, dtype=x.dtype, device=x.device)
    columns = torch.arange(width, dtype=x.dtype, device=x.device)
    return rows[:, None].expand(height, width), columns[None, :].expand(height, width)


def gaussian_blur(x: Images, sigma: float, truncate: float = 4.0, outside: str = "nearest") -> Images:
    """Return images (B, C, H, W) blurred with a Gaussian.

    Args:
        x: the images, on the CPU.
        sigma: in pixels.
        truncate: after how many sigmas the Gaussian is cut off.
        outside: what lies beyond the edge, as in `scipy.ndimage.gaussian_filter`.
    """
    blurred = ndimage.gaussian_filter(x.numpy(), (0, 0, sigma, sigma), mode=outside, truncate=truncate)
    return torch.from_numpy(blurred)


def convolve(x: Images, kernel: Tensor, outside: str) -> Images:
    """Return every channel of the images correlated with a kernel (h, w) of odd sides; the shape is kept.

    Args:
        x: images (B, C, H, W).
        kernel: the weights (h, w).
        outside: what lies beyond the edge: `replicate`, or `reflect` without repeating the edge. Where an image
            is too small to be reflected, its edge is repeated.
    """
    down, right = kernel.shape[0] // 2, kernel.shape[1] // 2
    if outside == "reflect" and (down >= x.shape[2] or right >= x.shape[3]):
        outside = "replicate"
    padded = F.pad(x, (right, right, down, down), mode=outside)
    flat = padded.flatten(0, 1)[:, None]
    return F.conv2d(flat, kernel[None, None]).view_as(x)


def zoom(x: Images, factor: float) -> Images:
    """Return the centre of the images enlarged by a factor of at least 1, with the same shape."""
    height, width = x.shape[2:]
    parts = [math.ceil(size / factor) for size in (height, width)]
    top, left = ((size - part) // 2 for size, part in zip((height, width), parts, strict=True))
    part = x[:, :, top : top + parts[0], left : left + parts[1]]
    sides = [round(size * factor) for size in parts]
    large = F.interpolate(part, size=sides, mode="bilinear", align_corners=True)
    top, left = ((side - size) // 2 for side, size in zip(sides, (height, width), strict=True))
    return large[:, :, top : top + height, left : left + width]


def motion_blur(x: Images, radius: float, sigma: float, angle: Tensor) -> Images:
    """Return images blurred along a line that begins at each pixel.

    Args:
        x: images (B, C, H, W).
        radius: the line has 2 radius + 1 pixels.
        sigma: of the half Gaussian that weights them.
        angle: of each image's line (B), in degrees.
    """
    taps = 2 * math.ceil(radius) + 1
    weights = torch.exp(-0.5 * (torch.arange(taps, dtype=x.dtype) / sigma) ** 2)
    weights = weights / weights.sum()
    batch, channels, height, width = x.shape
    turn = torch.deg2rad(angle)
    rows, columns = (grid.long()[None] for grid in pixel_grid(x))
    blurred = torch.zeros_like(x)
    for tap, weight in enumerate(weights.tolist()):
        down, right = (torch.ceil(tap * part - 0.5).long()[:, None, None] for part in (turn.sin(), turn.cos()))
        place = (rows + down).clamp(0, height - 1) * width + (columns + right).clamp(0, width - 1)
        index = place.view(batch, 1, height * width).expand(batch, channels, -1)
        blurred += weight * x.flatten(2).gather(2, index).view_as(x)
    return blurred
