"""The multi-resolution stack of Fort & Lakshminarayanan 2024 (arXiv:2408.05446): one image at several resolutions.

For each resolution independently, an image is changed in contrast, shifted, changed in colour, downsampled, given
noise, upsampled, given noise again and clipped; the results are concatenated along the channels. Order and
constants are those of the authors' notebook, which differ from their paper: see `PRESETS`. Random numbers are
drawn by counter, while the notebook uses numpy; images that are not square keep their aspect ratio.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from robustkit.core.errors import UsageError, did_you_mean
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images

# torchvision's weights of red, green and blue in grey values.
GREY = (0.2989, 0.587, 0.114)
# Contrast and colour factors take one of this many evenly spaced values.
FACTOR_LEVELS = 100
# The smallest of the published resolutions.
MIN_RESOLUTION = 4
Range = tuple[float, float]


@dataclass(frozen=True)
class MultiResolution:
    """The constants of a stack, which is a function of images.

    Args:
        resolutions: heights in pixels; widths are in proportion.
        noise_small: maximum of the uniform noise, from 0, that is added at each resolution.
        noise_large: maximum of the noise that is added after upsampling.
        jitter: the largest shift along each axis, in pixels; it is cyclic.
        contrast: smallest and largest factor of the blend with the mean grey value; None uses the colour's factor.
        colour: smallest and largest share of the image in the blend with the mean over its channels.
    """

    resolutions: tuple[int, ...]
    noise_small: float = 0.2
    noise_large: float = 0.2
    jitter: int = 3
    contrast: Range | None = None
    colour: Range = (0.5, 1.0)

    def __post_init__(self) -> None:
        """Refuse constants out of range."""
        if not self.resolutions or min(self.resolutions) < 1:
            raise UsageError(
                f"resolutions must be heights of at least 1 pixel, e.g. 32+16+8+4, got {self.resolutions}."
            )
        for name in ("noise_small", "noise_large", "jitter"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} must be at least 0, got {getattr(self, name):g}.")
        for name, given in (("contrast", self.contrast), ("colour", self.colour)):
            if given is not None and not 0 <= given[0] <= given[1] < math.inf:
                raise UsageError(f"{name}={given[0]:g}:{given[1]:g} must rise from 0 or more, e.g. 0.5:1.")

    @classmethod
    def preset(cls, name: str, height: int, **changed: Any) -> MultiResolution:
        """Return published constants, scaled from 32 pixels to the height of the images.

        Args:
            name: a key of `PRESETS`.
            height: of the images, in pixels.
            **changed: fields with other values.

        Raises:
            UsageError: for an unknown name.
        """
        if name not in PRESETS:
            raise did_you_mean("preset", name, PRESETS)
        scaled = {"resolutions": halves(height), "jitter": round(3 * height / 32)}
        return cls(**{**scaled, **PRESETS[name], **changed})

    def __call__(self, images: Images, rng: RowRng) -> Images:
        """Return the stacks (B R*C H W) of images (B C H W) in [0, 1]."""
        with torch.autocast(images.device.type, enabled=False):
            return torch.cat([self._resolution(number, images, rng) for number in range(len(self.resolutions))], 1)

    def _resolution(self, number: int, images: Images, rng: RowRng) -> Images:
        """Return the images (B C H W) at one resolution."""
        channels, height, width = images.shape[1:]
        small = self.resolutions[number], max(round(self.resolutions[number] * width / height), 1)
        sizes = [4, channels * small[0] * small[1], channels * height * width]
        draws = replace(rng, stream=f"{rng.stream}/resolution{number}").uniform(sum(sizes)).to(images)
        factors, low, high = torch.split(draws, sizes, 1)
        colour = _factor(factors[:, 0], self.colour)
        contrast = colour if self.contrast is None else _factor(factors[:, 1], self.contrast)
        x = grey_blend(images, contrast)
        if self.jitter:
            down, across = ((2 * self.jitter + 1) * factors[:, 2:]).long().sub(self.jitter).unbind(1)
            x = rolled(x, down, across)
        x = x.lerp(x.mean(1, keepdim=True), 1 - _wide(colour))
        x = resized(x, small) + self.noise_small * low.view(-1, channels, *small)
        x = resized(x, (height, width)) + self.noise_large * high.view(-1, channels, height, width)
        return torch.clamp(x, 0, 1)


# The notebook's code for contrast from 0.7 to 1.5 uses the factor of the colour; the paper says 0.7 to 1.5. The
# paper does not say whether its noise is uniform or normal: it is uniform in both presets.
PRESETS: dict[str, dict[str, Any]] = {
    "notebook": {"noise_small": 0.2, "noise_large": 0.2, "contrast": None, "colour": (0.5, 1.0)},
    "paper": {"noise_small": 0.2, "noise_large": 0.2, "contrast": (0.7, 1.5), "colour": (0.5, 1.0)},
}


def halves(height: int) -> tuple[int, ...]:
    """Return a height, its half, quarter and eighth, down to the published 4 pixels: 32, 16, 8, 4."""
    return tuple(height >> bits for bits in range(4) if bits == 0 or height >> bits >= MIN_RESOLUTION)


def grey_blend(images: Images, factor: Tensor) -> Images:
    """Return images blended with their mean grey value by factors (B), clipped: torchvision's contrast."""
    weights = images.new_tensor(GREY)[:, None, None]
    grey = (images * weights).sum(1) if images.shape[1] == len(GREY) else images.mean(1)
    return images.lerp(grey.mean((1, 2))[:, None, None, None], 1 - _wide(factor)).clamp(0, 1)


def rolled(images: Images, down: Tensor, across: Tensor) -> Images:
    """Return images shifted cyclically by numbers of pixels (B)."""
    height, width = images.shape[2:]
    rows = (torch.arange(height, device=images.device) - down[:, None]) % height
    columns = (torch.arange(width, device=images.device) - across[:, None]) % width
    moved = images.gather(2, rows[:, None, :, None].expand_as(images))
    return moved.gather(3, columns[:, None, None, :].expand_as(images))


def resized(images: Images, size: Sequence[int]) -> Images:
    """Return images resized, bicubic and without antialiasing; images that have the size are not changed."""
    if tuple(images.shape[2:]) == tuple(size):
        return images
    return F.interpolate(images, tuple(size), mode="bicubic", align_corners=False)


def _factor(draw: Tensor, between: Range) -> Tensor:
    low, high = between
    return low + (high - low) * (draw * FACTOR_LEVELS).floor() / (FACTOR_LEVELS - 1)


def _wide(factor: Tensor) -> Tensor:
    return factor[:, None, None, None]
