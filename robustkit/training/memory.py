"""What a method remembers of each image: a sign for each pixel and member, four of them in a byte.

They belong to the image as it is in the set: a crop or a flip moves them with it, and they are put back after.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from robustkit.training.images import PER_BYTE, Epoch, ImageSet

# What each of the four signs of a byte counts.
PLACES = (1, 4, 16, 64)


@dataclass(frozen=True)
class Memory:
    """Signs of a whole set: 0 to begin with.

    Attributes:
        packed: (N P) uint8, which changes in place.
        shape: height, width and channels of an image.
        members: nets that each have their own.
    """

    packed: Tensor
    shape: tuple[int, int, int]
    members: int

    @classmethod
    def of(cls, images: ImageSet, members: int) -> Memory:
        """Return the memory of a set of which nothing is known."""
        _, height, width, channels = images.pixels.shape
        length = -(-height * width * channels * members // PER_BYTE)
        blank = torch.full((len(images), length), sum(PLACES), dtype=torch.uint8, device=images.pixels.device)
        return cls(blank, (height, width, channels), members)

    def read(self, epoch: Epoch, rows: Tensor) -> Tensor:
        """Return the signs (B members C H W) of images as an epoch moves them."""
        height, width, channels = self.shape
        flat = unpacked(self.packed[rows])[:, : height * width * channels * self.members]
        moved = epoch.moved(flat.view(-1, height, width, self.members * channels), rows)
        return moved.view(-1, height, width, self.members, channels).permute(0, 3, 4, 1, 2).contiguous()

    def write(self, epoch: Epoch, rows: Tensor, signs: Tensor) -> None:
        """Remember these signs; of pixels that were cropped away nothing is known then."""
        plain = signs.permute(0, 3, 4, 1, 2).flatten(3)
        self.packed[rows] = packed(epoch.returned(plain, rows).flatten(1))


def packed(signs: Tensor) -> Tensor:
    """Return signs (B L) as bytes (B ceil(L / 4))."""
    digits = F.pad(signs + 1, (0, -signs.shape[1] % PER_BYTE), value=1).to(torch.uint8)
    return (digits.view(len(signs), -1, PER_BYTE) * digits.new_tensor(PLACES)).sum(2, dtype=torch.uint8)


def unpacked(found: Tensor) -> Tensor:
    """Return the signs (B 4 L) int8 of bytes (B L)."""
    digits = found[:, :, None] // found.new_tensor(PLACES) % 4
    return digits.flatten(1).to(torch.int8) - 1
