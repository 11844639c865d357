"""Corruptions by processing: contrast, elastic transform, pixelation and JPEG."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images
from robustkit.data.corruptions import sampling


def contrast(x: Images, rng: RowRng, factor: float) -> Images:
    """Return the images with their distance from each channel's mean multiplied by a factor below 1."""
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * factor + mean


def elastic_transform(x: Images, rng: RowRng, strength: float, sigma: float, shift: float) -> Images:
    """Return the images under a random affine map, then moved by a smooth random field.

    Args:
        x: images (B, C, H, W).
        rng: one generator for each image.
        strength: the field's factor, in pixels.
        sigma: of the Gaussian that smooths the field, in pixels.
        shift: by how many pixels the affine map moves its three points at the most.
    """
    batch, _, height, width = x.shape
    rows, columns = sampling.pixel_grid(x)
    arm = min(height, width) // 3
    centre = x.new_tensor([height // 2, width // 2])
    points = torch.stack([centre + arm, centre + x.new_tensor([-arm, arm]), centre - arm])
    moved = points + (rng.uniform(3, 2) * 2 - 1) * shift
    back = _affine(moved, points.expand(batch, 3, 2))
    where = torch.einsum("hwk,bkd->bhwd", torch.stack([rows, columns, torch.ones_like(rows)], 2), back)
    affine = sampling.sample(x, where[..., 0], where[..., 1])
    field = rng.at(step=1).uniform(2, height, width) * 2 - 1
    field = sampling.gaussian_blur(field, sigma, truncate=3.0, outside="reflect") * strength
    return sampling.sample(affine, rows + field[:, 0], columns + field[:, 1])


def _affine(source: Tensor, target: Tensor) -> Tensor:
    """Return the maps (B, 3, 2) that take three points (B, 3, 2) to three others."""
    ones = torch.ones_like(source[..., :1])
    maps: Tensor = torch.linalg.solve(torch.cat([source, ones], 2).double(), target.double())
    return maps.to(source.dtype)


def pixelate(x: Images, rng: RowRng, scale: float) -> Images:
    """Return the images reduced to a share of their sides and enlarged again, both by box filters."""
    for axis in (2, 3):
        size = x.shape[axis]
        small = max(1, int(size * scale))
        both = _box(small, size) @ _box(size, small)
        x = torch.tensordot(x, both.to(x.dtype), dims=([axis], [1])).movedim(-1, axis)
    return x


def _box(size: int, wanted: int) -> Tensor:
    """Return the matrix (wanted, size) that resizes with a box filter, as Pillow does."""
    scale = size / wanted
    support = 0.5 * max(scale, 1)
    centres = (np.arange(wanted) + 0.5) * scale
    inside = (np.arange(size)[None] + 0.5 - centres[:, None]) / max(scale, 1)
    low, high = np.floor(centres - support + 0.5), np.floor(centres + support + 0.5)
    pixels = np.arange(size)[None]
    weights = (inside > -0.5) & (inside <= 0.5) & (pixels >= low[:, None]) & (pixels < high[:, None])
    return torch.from_numpy(weights / weights.sum(1, keepdims=True))


def jpeg_compression(x: Images, rng: RowRng, quality: float) -> Images:
    """Return the images after JPEG compression; channels are compressed one by one unless there are three."""
    values = (x * 255).round().to(torch.uint8).numpy()
    out = np.empty_like(values)
    for row, image in enumerate(values):
        if len(image) == 3:
            out[row] = _jpeg(image.transpose(1, 2, 0), int(quality)).transpose(2, 0, 1)
        else:
            out[row] = [_jpeg(channel, int(quality)) for channel in image]
    return torch.from_numpy(out).to(x.dtype) / 255


def _jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer, formats=["JPEG"]))
