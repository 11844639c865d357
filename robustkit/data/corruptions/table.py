"""The 15 corruptions with their published constants (Hendrycks & Dietterich 2019, arXiv:1903.12261).

The constants of CIFAR-10-C are for images of 32 pixels, those of ImageNet-C for 224 pixels. An image takes the
table whose size is nearer to its shorter side, by ratio.

Departures: values are rounded to the 256 levels of stored images, where the published code cuts them off. Lengths
in pixels are multiplied by the ratio of the image's shorter side to the table's size, so that a severity means the
same at other sizes; at 32 and 224 pixels they are the published ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from robustkit.core.errors import UsageError, did_you_mean
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images
from robustkit.data.corruptions import blur, digital, noise, weather
from robustkit.data.corruptions.names import SEVERITIES

SMALL, LARGE = 32, 224


@dataclass(frozen=True)
class Corruption:
    """One kind of corruption.

    Attributes:
        apply: from images, generators and constants to corrupted images, not yet clipped.
        small: constants of the five severities at 32 pixels.
        large: those at 224 pixels.
        lengths: the positions of constants that are lengths in pixels.
        alexnet: the mean error of AlexNet on ImageNet-C, by which errors there are divided.
    """

    apply: Callable[..., Images]
    small: Sequence[tuple[float, ...]]
    large: Sequence[tuple[float, ...]]
    alexnet: float
    lengths: tuple[int, ...] = ()

    def constants(self, severity: int, side: int) -> tuple[float, ...]:
        """Return the constants of a severity for images with this shorter side."""
        large = math.log(max(side, 1) / SMALL) > math.log(LARGE / max(side, 1))
        row = (self.large if large else self.small)[severity - 1]
        ratio = side / (LARGE if large else SMALL)
        return tuple(value * ratio if place in self.lengths else value for place, value in enumerate(row))


def _ones(*values: float) -> tuple[tuple[float, ...], ...]:
    return tuple((value,) for value in values)


CORRUPTIONS = {
    "gaussian_noise": Corruption(
        noise.gaussian_noise,
        _ones(0.04, 0.06, 0.08, 0.09, 0.10),
        _ones(0.08, 0.12, 0.18, 0.26, 0.38),
        0.886428,
    ),
    "shot_noise": Corruption(noise.shot_noise, _ones(500, 250, 100, 75, 50), _ones(60, 25, 12, 5, 3), 0.894468),
    "impulse_noise": Corruption(
        noise.impulse_noise,
        _ones(0.01, 0.02, 0.03, 0.05, 0.07),
        _ones(0.03, 0.06, 0.09, 0.17, 0.27),
        0.922640,
    ),
    "defocus_blur": Corruption(
        blur.defocus_blur,
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        0.819880,
        (0, 1),
    ),
    "glass_blur": Corruption(
        blur.glass_blur,
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
        0.826268,
        (0, 1),
    ),
    "motion_blur": Corruption(
        blur.motion_blur,
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        0.785948,
        (0, 1),
    ),
    "zoom_blur": Corruption(
        blur.zoom_blur,
        ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
        0.798360,
    ),
    "snow": Corruption(
        weather.snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
        0.866816,
        (4, 5),
    ),
    "frost": Corruption(
        weather.frost,
        ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
        ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
        0.826572,
    ),
    "fog": Corruption(
        weather.fog,
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
        0.819324,
    ),
    "brightness": Corruption(
        weather.brightness,
        _ones(0.05, 0.1, 0.15, 0.2, 0.3),
        _ones(0.1, 0.2, 0.3, 0.4, 0.5),
        0.564592,
    ),
    "contrast": Corruption(
        digital.contrast, _ones(0.75, 0.5, 0.4, 0.3, 0.15), _ones(0.4, 0.3, 0.2, 0.1, 0.05), 0.853204
    ),
    "elastic_transform": Corruption(
        digital.elastic_transform,
        ((0, 0, 2.56), (1.6, 6.4, 2.24), (2.56, 1.92, 1.92), (3.2, 1.28, 1.6), (3.2, 0.96, 0.96)),
        ((488, 170.8, 24.4), (488, 19.52, 48.8), (12.2, 2.44, 4.88), (17.08, 2.44, 4.88), (29.28, 2.44, 4.88)),
        0.646056,
        (0, 1, 2),
    ),
    "pixelate": Corruption(
        digital.pixelate, _ones(0.95, 0.9, 0.85, 0.75, 0.65), _ones(0.6, 0.5, 0.4, 0.3, 0.25), 0.717840
    ),
    "jpeg_compression": Corruption(
        digital.jpeg_compression, _ones(80, 65, 58, 50, 40), _ones(25, 18, 15, 10, 7), 0.606500
    ),
}


def corrupt(x: Images, name: str, severity: int, ids: torch.Tensor) -> Images:
    """Return corrupted images.

    Args:
        x: images (B, C, H, W), float32 in [0, 1], on the CPU.
        name: of the corruption, a key of `CORRUPTIONS`.
        severity: from 1 to 5.
        ids: a number below 2**32 for each image (B); the same image with the same number is corrupted in the same
            way, whatever else is in the batch.

    Returns:
        Images of the same shape, in [0, 1], with the 256 levels of stored images.

    Raises:
        UsageError: the corruption or the severity does not exist.

    Example:
        >>> corrupt(torch.rand(2, 3, 32, 40), "fog", 3, torch.arange(2)).shape
        torch.Size([2, 3, 32, 40])
    """
    if name not in CORRUPTIONS:
        raise did_you_mean("corruption", name, CORRUPTIONS)
    if severity not in SEVERITIES:
        raise UsageError(f"corruption {name!r} has no severity {severity}; write 1 to 5.")
    kind = CORRUPTIONS[name]
    rng = RowRng(0, f"corruption/{name}/{severity}", ids)
    changed = kind.apply(x, rng, *kind.constants(severity, min(x.shape[2:])))
    return ((changed.clamp(0, 1) * 255).round() / 255).to(x.dtype)
