"""The multi-resolution stack of Fort & Lakshminarayanan 2024 (arXiv:2408.05446): one image at several resolutions.

For each resolution by itself an image is changed in contrast, moved, changed in colour, made small, made noisy,
made large again, made noisy once more and clipped; the results lie one behind the other along the channels. Order
and constants are those of the authors' notebook, whose paper says other ones: see `PRESETS`. Random numbers are
drawn by counter, where the notebook takes numpy's; images that are not square keep their shape when small.
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

# torchvision's weights of red, green and blue in grey.
GREY = (0.2989, 0.587, 0.114)
# A factor is one of so many, evenly spaced.
FACTORS = 100
# Of the published resolutions.
SMALLEST = 4
Range = tuple[float, float]


@dataclass(frozen=True)
class MultiResolution:
    """The constants of a stack.

    Attributes:
        resolutions: heights in pixels; widths are in proportion.
        noise_small: of the uniform noise from 0 that is added at each resolution.
        noise_large: of that which is added after enlarging.
        jitter: the most pixels that an image is moved by, along either axis; what leaves comes in again.
        contrast: least and largest factor of the blend with the mean grey; None takes the colour's draw.
        colour: least and largest share of the image, the rest being the mean over its channels.
    """

    resolutions: tuple[int, ...]
    noise_small: float = 0.2
    noise_large: float = 0.2
    jitter: int = 3
    contrast: Range | None = None
    colour: Range = (0.5, 1.0)

    def __post_init__(self) -> None:
        """Refuse what no image can go through."""
        if not self.resolutions or min(self.resolutions) < 1:
            raise UsageError(f"resolutions {self.resolutions}: write heights of at least 1 pixel, e.g. 32+16+8+4.")
        for name in ("noise_small", "noise_large", "jitter"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name}={getattr(self, name):g} must not be negative; 0 is none.")
        for name, given in (("contrast", self.contrast), ("colour", self.colour)):
            if given is not None and not 0 <= given[0] <= given[1] < math.inf:
                raise UsageError(f"{name}={given[0]:g}:{given[1]:g} must rise from 0 or more, e.g. 0.5:1.")

    @classmethod
    def preset(cls, name: str, height: int, **changed: Any) -> MultiResolution:
        """Return published constants for images of a height; what is published for 32 pixels is scaled.

        Raises:
            UsageError: for an unknown name.
        """
        if name not in PRESETS:
            raise did_you_mean("preset", name, PRESETS)
        usual = {"resolutions": halves(height), "jitter": round(3 * height / 32)}
        return cls(**{**usual, **PRESETS[name], **changed})

    def __call__(self, images: Images, rng: RowRng) -> Images:
        """Return the stacks (B R*C H W) of images (B C H W) in [0, 1]."""
        with torch.autocast(images.device.type, enabled=False):
            return torch.cat([self._at(number, images, rng) for number in range(len(self.resolutions))], 1)

    def _at(self, number: int, images: Images, rng: RowRng) -> Images:
        """Return the images as one resolution shows them."""
        channels, height, width = images.shape[1:]
        small = self.resolutions[number], max(round(self.resolutions[number] * width / height), 1)
        sizes = [4, channels * small[0] * small[1], channels * height * width]
        draws = replace(rng, stream=f"{rng.stream}/resolution{number}").uniform(sum(sizes)).to(images)
        dice, low, high = torch.split(draws, sizes, 1)
        colour = _factor(dice[:, 0], self.colour)
        contrast = colour if self.contrast is None else _factor(dice[:, 1], self.contrast)
        x = grey_blend(images, contrast)
        if self.jitter:
            down, across = ((2 * self.jitter + 1) * dice[:, 2:]).long().sub(self.jitter).unbind(1)
            x = rolled(x, down, across)
        x = x.lerp(x.mean(1, keepdim=True), 1 - _wide(colour))
        x = resized(x, small) + self.noise_small * low.view(-1, channels, *small)
        x = resized(x, (height, width)) + self.noise_large * high.view(-1, channels, height, width)
        return torch.clamp(x, 0, 1)


# The notebook means to draw contrast from 0.7 to 1.5 and gives it the colour's draw; the paper says 0.7 to 1.5.
# Whether the paper's noise is uniform or normal is not known: it is uniform in both.
PRESETS: dict[str, dict[str, Any]] = {
    "notebook": {"noise_small": 0.2, "noise_large": 0.2, "contrast": None, "colour": (0.5, 1.0)},
    "paper": {"noise_small": 0.2, "noise_large": 0.2, "contrast": (0.7, 1.5), "colour": (0.5, 1.0)},
}


def halves(height: int) -> tuple[int, ...]:
    """Return a height, its half, quarter and eighth, down to the 4 pixels published: 32, 16, 8, 4."""
    return tuple(height >> by for by in range(4) if by == 0 or height >> by >= SMALLEST)


def grey_blend(images: Images, factor: Tensor) -> Images:
    """Return images blended with their mean grey level, clipped: torchvision's contrast, a factor (B) each."""
    weights = images.new_tensor(GREY)[:, None, None]
    grey = (images * weights).sum(1) if images.shape[1] == len(GREY) else images.mean(1)
    return images.lerp(grey.mean((1, 2))[:, None, None, None], 1 - _wide(factor)).clamp(0, 1)


def rolled(images: Images, down: Tensor, across: Tensor) -> Images:
    """Return images moved by whole pixels (B), around their edges."""
    height, width = images.shape[2:]
    rows = (torch.arange(height, device=images.device) - down[:, None]) % height
    columns = (torch.arange(width, device=images.device) - across[:, None]) % width
    moved = images.gather(2, rows[:, None, :, None].expand_as(images))
    return moved.gather(3, columns[:, None, None, :].expand_as(images))


def resized(images: Images, size: Sequence[int]) -> Images:
    """Return images of another size, bicubic and without antialiasing; of their own size as they are."""
    if tuple(images.shape[2:]) == tuple(size):
        return images
    return F.interpolate(images, tuple(size), mode="bicubic", align_corners=False)


def _factor(draw: Tensor, between: Range) -> Tensor:
    low, high = between
    return low + (high - low) * (draw * FACTORS).floor() / (FACTORS - 1)


def _wide(factor: Tensor) -> Tensor:
    return factor[:, None, None, None]
