"""Corruptions by weather: snow, frost, fog and brightness."""

from __future__ import annotations

import torch
from torch import Tensor

from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images
from robustkit.data.corruptions import sampling
from robustkit.data.corruptions.plasma import clouds

# The weights of red, green and blue in the brightness that a viewer sees.
LUMA = (0.299, 0.587, 0.114)
# The colour of frost.
ICE = (0.86, 0.93, 1.0)


def snow(
    x: Images,
    rng: RowRng,
    mean: float,
    deviation: float,
    enlargement: float,
    threshold: float,
    radius: float,
    sigma: float,
    kept: float,
) -> Images:
    """Return whitened images with flakes: noise that is enlarged, cut off and blurred along a falling line."""
    height, width = x.shape[2:]
    flakes = (mean + deviation * rng.normal(1, height, width)).to(x.dtype)
    flakes = sampling.zoom(flakes, enlargement)
    flakes = torch.where(flakes < threshold, torch.zeros_like(flakes), flakes).clamp(0, 1)
    angle = rng.at(step=1).uniform(1)[:, 0] * 90 - 135
    flakes = sampling.motion_blur(flakes, radius, sigma, angle)
    white = torch.maximum(x, _grey(x) * 1.5 + 0.5)
    return kept * x + (1 - kept) * white + flakes + flakes.rot90(2, (2, 3))


def frost(x: Images, rng: RowRng, kept: float, strength: float) -> Images:
    """Return dimmed images under a layer of ice crystals.

    Departure: the published code takes one of five photographs of frost, which are not part of this package; the
    layer is a ridged cloud of similar brightness instead.
    """
    ridges = 1 - (2 * clouds(rng, x.shape[2], x.shape[3], decay=1.8) - 1).abs()
    layer = (ridges.clamp(0, 1) ** 3)[:, None]
    colour = x.new_tensor(ICE).view(1, 3, 1, 1) if x.shape[1] == 3 else x.new_ones(1, 1, 1, 1)
    return kept * x + strength * layer * colour


def fog(x: Images, rng: RowRng, strength: float, decay: float) -> Images:
    """Return the images under a cloud, with their largest value kept."""
    brightest = x.amax((1, 2, 3), keepdim=True)
    cloud = clouds(rng, x.shape[2], x.shape[3], decay)[:, None]
    return (x + strength * cloud) * brightest / (brightest + strength)


def brightness(x: Images, rng: RowRng, amount: float) -> Images:
    """Return the images with their value (of hue, saturation and value) raised by `amount`."""
    value = x.amax(1, keepdim=True)
    raised = (value + amount).clamp(0, 1)
    return torch.where(value > 0, x * raised / value.clamp(min=1e-12), raised.expand_as(x))


def _grey(x: Images) -> Tensor:
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    return (x * x.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
