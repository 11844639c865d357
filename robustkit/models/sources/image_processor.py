"""An image processor of transformers as a part of the model: its resizing, crop and normalisation.

Images on [0, 1] go in. Those that have the processor's final size are not resized again, as image files are
read at that size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from robustkit.core.preprocess import Preprocess

# Pillow's numbers of the filters; Lanczos is not differentiable in torch, and bicubic is its nearest.
_FILTERS = {0: "nearest", 1: "bicubic", 2: "bilinear", 3: "bicubic"}
# Below this side, processors with `crop_pct` crop; from it on, they resize to the square.
_MIN_UNCROPPED = 384


@dataclass(frozen=True)
class ImageSettings:
    """What an image processor does.

    Attributes:
        mean: Subtracted from each channel, in [0, 1] pixel units; None for nothing.
        std: Divides each channel afterwards; None for nothing.
        side: Length of the shorter side before the crop, in pixels; None if the image is resized to `size`
            whatever its form.
        size: Height and width that the net is given, in pixels; None if they are not changed.
        interpolation: Name of the filter.
    """

    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    side: int | None
    size: tuple[int, int] | None
    interpolation: str

    @classmethod
    def read(cls, processor: Any) -> ImageSettings:
        """Return the settings of a processor of transformers."""

        def get(name: str) -> Any:
            return getattr(processor, name, None)

        side, size = _sizes(get)
        mean, std = _normalisation(get)
        return cls(mean, std, side, size, _FILTERS.get(int(get("resample") or 2), "bilinear"))

    @property
    def preprocess(self) -> Preprocess | None:
        """How image files are read; they are cropped, where the processor would change their form."""
        if self.size is None:
            return None
        return Preprocess(self.size, self.side or min(self.size), self.interpolation)


class PreparedImages(nn.Module):
    """A net that is given images as an image processor makes them, except for the normalisation.

    Attributes:
        net: The net of the library.
        settings: What the processor does.
        call: Returns the logits of the net for images.
    """

    def __init__(
        self, net: nn.Module, settings: ImageSettings, call: Callable[[Any, torch.Tensor], torch.Tensor]
    ) -> None:
        """Wrap a net."""
        super().__init__()
        self.net, self.settings, self.call = net, settings, call

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, K) of normalised images (B C H W) of any height and width."""
        return self.call(self.net, self._resized(images))

    def _resized(self, images: torch.Tensor) -> torch.Tensor:
        settings = self.settings
        if settings.size is None or images.shape[2:] == settings.size:
            return images
        given, size = images.shape[2:], settings.size
        if settings.side is not None:
            scale = settings.side / min(given)
            # The longer side is rounded down, as transformers and torchvision do; the crop has to fit in.
            size = (max(int(given[0] * scale), size[0]), max(int(given[1] * scale), size[1]))
        if settings.interpolation == "nearest":
            images = F.interpolate(images, size, mode="nearest-exact")
        elif given != size:
            images = F.interpolate(images, size, mode=settings.interpolation, antialias=True, align_corners=False)
        height, width = settings.size
        top, left = ((side - crop) // 2 for side, crop in zip(size, settings.size, strict=True))
        return images[:, :, top : top + height, left : left + width]


def _sizes(get: Callable[[str], Any]) -> tuple[int | None, tuple[int, int] | None]:
    """Return the shorter side before the crop, and the final height and width."""
    resize = get("size") if get("do_resize") else None
    crop = _pair(get("crop_size")) if get("do_center_crop") else None
    whole, edge = _pair(resize), _entry(resize, "shortest_edge")
    if edge is not None and get("crop_pct") and crop is None:
        crop = (edge, edge)
        if edge >= _MIN_UNCROPPED:
            return None, crop
        edge = int(edge / get("crop_pct"))
    if crop is None:
        return edge, whole or (None if edge is None else (edge, edge))
    # A square that is then cropped has the shorter side of the square.
    return edge or (min(whole) if whole else None), crop


def _normalisation(get: Callable[[str], Any]) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Return mean and deviation for images on [0, 1] of a processor for pixels in [0, 255]."""
    scale = 255 * (get("rescale_factor") or 1 / 255) if get("do_rescale") is not False else 255.0
    offset = 1.0 if get("rescale_offset") else 0.0
    means, stds = (get("image_mean"), get("image_std")) if get("do_normalize") else (0.0, 1.0)
    mean = tuple(round((value + offset) / scale, 12) for value in _listed(means))
    std = tuple(round(value / scale, 12) for value in _listed(stds))
    return (None if not any(mean) else mean), (None if set(std) == {1.0} else std)


def _listed(value: Any) -> tuple[float, ...]:
    return tuple(map(float, value)) if isinstance(value, (list, tuple)) else (float(value),)


def _entry(size: Any, name: str) -> int | None:
    """Return an entry of a size, which is a dict, an object with attributes or a number."""
    if isinstance(size, (int, float)):
        return int(size)
    found = size.get(name) if isinstance(size, Mapping) else getattr(size, name, None)
    return None if found is None else int(found)


def _pair(size: Any) -> tuple[int, int] | None:
    height, width = _entry(size, "height"), _entry(size, "width")
    return None if height is None or width is None or isinstance(size, float) else (height, width)
