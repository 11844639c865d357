"""JPEG compression before the net (Dziugaite et al. 2016, arXiv:1608.00853; quality 75 as in arXiv:1711.00117).

The codec is libjpeg by way of torchvision.io, with its usual halved chroma, on images rounded to 8 bits.
It has no gradient, and none is made up: gradient attacks see zero, and the checks say so.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from robustkit.errors import UsageError
from robustkit.registry import defense
from robustkit.rows import Model
from robustkit.shapes import Images, Logits


@defense("jpeg", paper="arXiv:1608.00853")
@dataclass(frozen=True, slots=True)
class Jpeg:
    """Each image is compressed and decompressed, at a quality from 1 to 100."""

    quality: int = 75

    def __post_init__(self) -> None:
        """Refuse what the codec has no tables for."""
        if not 1 <= self.quality <= 100:
            raise UsageError(f"jpeg: quality={self.quality} must be from 1 to 100, e.g. jpeg:75.")

    def __call__(self, model: Model, x: Images) -> Logits:
        """Return the model's logits of the compressed images."""
        return model(_compressed(x, self.quality))


def _compressed(x: Images, quality: int) -> Images:
    from torchvision.io import decode_jpeg, encode_jpeg

    if x.shape[1] not in (1, 3):
        raise UsageError(f"jpeg: images have {x.shape[1]} channels; it compresses 1 (gray) or 3 (RGB).")
    if not len(x):
        return x
    # Always on the CPU: a GPU's codec rounds otherwise, and a verdict must not depend on the device.
    levels = (x.detach().float().clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    files = encode_jpeg(list(levels.contiguous()), quality)
    return torch.stack(decode_jpeg(files)).to(x) / 255
