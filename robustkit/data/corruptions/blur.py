"""Corruptions by blur: defocus, glass, motion and zoom."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images
from robustkit.data.corruptions import sampling


def defocus_blur(x: Images, rng: RowRng, radius: float, alias: float) -> Images:
    """Return the images blurred with a disk, whose edge is softened with a Gaussian of `alias` pixels."""
    return sampling.convolve(x, _disk(radius, alias), "reflect")


def _disk(radius: float, alias: float) -> Tensor:
    soft = 1 if radius <= 8 else 2
    reach = math.floor(radius) + soft
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float32)
    disk = (offsets[:, None] ** 2 + offsets[None, :] ** 2 <= radius**2).float()
    edge = torch.exp(-0.5 * (torch.arange(-soft, soft + 1, dtype=torch.float32) / alias) ** 2)
    edge = edge / edge.sum()
    disk = (disk / disk.sum())[None, None]
    return sampling.convolve(sampling.convolve(disk, edge[:, None], "replicate"), edge[None, :], "replicate")[0, 0]


def glass_blur(x: Images, rng: RowRng, sigma: float, distance: float, rounds: int) -> Images:
    """Return blurred images whose pixels are replaced by neighbours at most `distance` away, in several rounds.

    Departure: none from the published code, which assigns a neighbour to a pixel where its text speaks of
    swapping the two.
    """
    reach = max(1, round(distance))
    batch, channels, height, width = x.shape
    rows = np.arange(height - reach, reach, -1)
    columns = np.arange(width - reach, reach, -1)
    places = np.arange(height * width)[None].repeat(batch, 0)
    images = np.arange(batch)
    for number in range(rounds):
        offsets = rng.at(step=1 + number).integers(2 * reach, 2, len(rows), len(columns)).numpy() - reach
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                neighbour = (row + offsets[:, 0, i, j]) * width + column + offsets[:, 1, i, j]
                places[:, row * width + column] = places[images, neighbour]
    blurred = sampling.gaussian_blur(x, sigma)
    index = torch.from_numpy(places)[:, None].expand(batch, channels, -1)
    return sampling.gaussian_blur(blurred.flatten(2).gather(2, index).view_as(x), sigma)


def motion_blur(x: Images, rng: RowRng, radius: float, sigma: float) -> Images:
    """Return the images blurred along a line at an angle from -45 to 45 degrees."""
    return sampling.motion_blur(x, radius, sigma, rng.uniform(1)[:, 0] * 90 - 45)


def zoom_blur(x: Images, rng: RowRng, largest: float, step: float) -> Images:
    """Return the mean of the images and of their centres, enlarged by factors from 1 in steps to `largest`."""
    factors = np.arange(1, largest, step).tolist()
    return (x + sum(sampling.zoom(x, factor) for factor in factors)) / (len(factors) + 1)
