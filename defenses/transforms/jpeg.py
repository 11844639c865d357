"""JPEG compression before the net (Dziugaite et al. 2016, arXiv:1608.00853; quality 75 as in arXiv:1711.00117).

The codec is Pillow's with its default chroma subsampling, on images rounded to 8 bits, on the CPU. It has no
gradient and no surrogate: gradient attacks get a gradient of zero, which the checks report.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray

from robustkit.attack_api import Model
from robustkit.core.errors import UsageError
from robustkit.core.limits import Limits
from robustkit.core.shapes import Images, Logits
from robustkit.registry import defense


@defense("jpeg", paper="arXiv:1608.00853")
@dataclass(frozen=True, slots=True)
class Jpeg:
    """Compresses and decompresses each image, with a quality from 1 to 100."""

    quality: Annotated[int, Limits(1, 100)] = 75

    def __call__(self, model: Model, x: Images) -> Logits:
        """Return the model's logits (B K) of the compressed images."""
        return model(_compressed(x, self.quality))


def _compressed(x: Images, quality: int) -> Images:
    if x.shape[1] not in (1, 3):
        raise UsageError(f"jpeg: images must have 1 (grey) or 3 (RGB) channels, got {x.shape[1]}.")
    levels = (x.detach().float().clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    arrays = levels.permute(0, 2, 3, 1).contiguous().numpy()
    # A JPEG file holds one image, so the codec is called for each.
    decoded = np.stack([_decoded(array, quality) for array in arrays]) if len(arrays) else arrays
    return torch.from_numpy(decoded).permute(0, 3, 1, 2).contiguous().to(x) / 255


def _decoded(levels: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    """Return one image (H W C) after compression with this quality."""
    from PIL import Image

    file = BytesIO()
    Image.fromarray(levels if levels.shape[2] == 3 else levels[:, :, 0]).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file, formats=("JPEG",))).reshape(levels.shape)
