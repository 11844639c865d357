"""Perturbation signs of the training images, one for each pixel and member, stored as four signs per byte.

The signs are stored for the images without augmentation: crops and flips are applied on reading and undone on
writing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from robustkit.training.images import SIGNS_PER_BYTE, Epoch, ImageSet

# Place values of the four signs in a byte.
POWERS_OF_FOUR = (1, 4, 16, 64)


@dataclass(frozen=True)
class PerturbationMemory:
    """Perturbation signs of a training set; all 0 at the beginning.

    Args:
        packed: (N P) uint8, changed in place.
        shape: height, width and channels of an image.
        members: number of nets, each with signs of its own.
    """

    packed: Tensor
    shape: tuple[int, int, int]
    members: int

    @classmethod
    def of(cls, images: ImageSet, members: int) -> PerturbationMemory:
        """Return the memory of a set, with all signs 0."""
        _, height, width, channels = images.pixels.shape
        length = -(-height * width * channels * members // SIGNS_PER_BYTE)
        device = images.pixels.device
        zeros = torch.full((len(images), length), sum(POWERS_OF_FOUR), dtype=torch.uint8, device=device)
        return cls(zeros, (height, width, channels), members)

    def read(self, epoch: Epoch, rows: Tensor) -> Tensor:
        """Return the signs (B members C H W) of the images in these rows, with the augmentation of the epoch."""
        height, width, channels = self.shape
        flat = unpack_signs(self.packed[rows])[:, : height * width * channels * self.members]
        moved = epoch.moved(flat.view(-1, height, width, self.members * channels), rows)
        return moved.view(-1, height, width, self.members, channels).permute(0, 3, 4, 1, 2).contiguous()

    def write(self, epoch: Epoch, rows: Tensor, signs: Tensor) -> None:
        """Store the signs (B members C H W) of the images in these rows; pixels that were cropped away get 0."""
        plain = signs.permute(0, 3, 4, 1, 2).flatten(3)
        self.packed[rows] = pack_signs(epoch.returned(plain, rows).flatten(1))


def pack_signs(signs: Tensor) -> Tensor:
    """Return signs (B L) as bytes (B ceil(L / 4))."""
    digits = F.pad(signs + 1, (0, -signs.shape[1] % SIGNS_PER_BYTE), value=1).to(torch.uint8)
    return (digits.view(len(signs), -1, SIGNS_PER_BYTE) * digits.new_tensor(POWERS_OF_FOUR)).sum(
        2, dtype=torch.uint8
    )


def unpack_signs(packed: Tensor) -> Tensor:
    """Return the signs (B 4 L) int8 of bytes (B L)."""
    digits = packed[:, :, None] // packed.new_tensor(POWERS_OF_FOUR) % 4
    return digits.flatten(1).to(torch.int8) - 1
