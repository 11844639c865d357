"""Preprocessing of image files to tensors in [0, 1]; the normalisation is part of the classifier."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preprocess:
    """How an image file is converted to a tensor in [0, 1].

    Args:
        size: Height and width of the centre crop, in pixels.
        resize: Length of the shorter side before the crop, in pixels, or more where the crop would not fit into
            the image; None leaves the image as it is.
        interpolation: Name of the resampling filter: nearest, bilinear or bicubic.
    """

    size: tuple[int, int]
    resize: int | None
    interpolation: str = "bilinear"
