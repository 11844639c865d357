"""How a model wants image files turned into tensors on [0, 1]; normalisation lives inside the classifier."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preprocess:
    """The way from an image file to a tensor on [0, 1].

    Attributes:
        size: Height and width of the centre crop, in pixels.
        resize: Length of the shorter side before the crop, in pixels, or more where the crop would not fit into
            the image; None leaves the image as it is.
        interpolation: Name of the resampling filter: nearest, bilinear or bicubic.
    """

    size: tuple[int, int]
    resize: int | None
    interpolation: str = "bilinear"
