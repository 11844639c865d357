"""A training set in memory and its batches. Order and augmentation of the images are functions of the seed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from robustkit.core.errors import UsageError
from robustkit.core.rng import RowRng
from robustkit.data.samples import Samples
from robustkit.training import augment
from robustkit.training.method import Batch, Plan

# Perturbation signs stored per byte (`robustkit.training.memory`).
SIGNS_PER_BYTE = 4

_CHUNK = 1024


@dataclass(frozen=True)
class ImageSet:
    """All images of a set in memory.

    Args:
        pixels: (N H W C), uint8 where the images are 8-bit, else float32 in [0, 1].
        labels: (N).
    """

    pixels: Tensor
    labels: Tensor

    @classmethod
    def read(cls, samples: Samples) -> ImageSet:
        """Read a whole set, as uint8 if all images have 8-bit values."""
        chunks: list[Tensor] = []
        exact = True
        for start in range(0, len(samples), _CHUNK):
            x = samples.images(np.arange(start, min(start + _CHUNK, len(samples)))).permute(0, 2, 3, 1)
            if exact:
                whole = (x * 255).round().to(torch.uint8)
                exact = bool((whole.float() / 255 == x).all())
                if exact:
                    chunks.append(whole.contiguous())
                    continue
                chunks = [chunk.float() / 255 for chunk in chunks]
            chunks.append(x.contiguous())
        return cls(torch.cat(chunks), torch.from_numpy(samples.labels.astype(np.int64)))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def channels(self) -> int:
        """C."""
        return self.pixels.shape[3]

    @property
    def height(self) -> int:
        """H, in pixels."""
        return self.pixels.shape[1]

    def to(self, device: torch.device) -> ImageSet:
        """Return the set on a device."""
        return ImageSet(self.pixels.to(device), self.labels.to(device))

    def at(self, rows: Tensor | slice) -> Tensor:
        """Return these images without augmentation: float32 (B C H W) in [0, 1], channels last in memory."""
        return as_images(self.pixels[rows])

    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and standard deviation of each channel over the set, to four decimals."""
        count = self.pixels[..., 0].numel()
        total = torch.zeros(2, self.channels, dtype=torch.float64)
        for chunk in torch.split(self.pixels, _CHUNK):
            values = (chunk.double() / 255 if chunk.dtype == torch.uint8 else chunk.double()).flatten(0, 2)
            total += torch.stack([values.sum(0), values.square().sum(0)])
        mean, square = total / count
        std = (square - mean**2).clamp_min(0).sqrt()
        return tuple(round(m, 4) for m in mean.tolist()), tuple(max(round(s, 4), 1e-4) for s in std.tolist())


@dataclass(frozen=True)
class Epoch:
    """One pass over a set: the order of the images and their augmentation.

    Args:
        images: the set, N images.
        plan: the size of the run.
        number: number of the epoch, from 0.
        order: permutation (N) of the images.
        moves: random integers (N 3) of the augmentation: vertical shift, horizontal shift, flip.
        augmentation: the transforms, parts of `robustkit.training.augment.CHOICES`.
        partners: with pairs: the same images in another random order.
    """

    images: ImageSet
    plan: Plan
    number: int
    order: Tensor
    moves: Tensor
    augmentation: tuple[str, ...]
    partners: Epoch | None = None

    @classmethod
    def of(
        cls, images: ImageSet, plan: Plan, number: int, augmentation: tuple[str, ...], pairs: bool = False
    ) -> Epoch:
        """Draw an epoch, and its partners with `pairs`; the numbers depend on seed, epoch and image only."""
        partners = cls._drawn(images, plan, number, augmentation, "partner ") if pairs else None
        return replace(cls._drawn(images, plan, number, augmentation, ""), partners=partners)

    @classmethod
    def _drawn(cls, images: ImageSet, plan: Plan, number: int, augmentation: tuple[str, ...], whose: str) -> Epoch:
        ids = torch.arange(len(images), device=images.labels.device)
        key = RowRng(plan.seed, f"{whose}order", ids, step=number).integers(2**31, 1)[:, 0]
        order = key.argsort(stable=True)
        moves = RowRng(plan.seed, f"{whose}augmentation", ids, step=number).integers(2**31, 3)
        return cls(images, plan, number, order, moves, augmentation)

    def batch(self, index: int, part: int = 0, parts: int = 1) -> Batch:
        """Return a batch of the epoch, or every `parts`-th image of it from `part` on."""
        start = index * self.plan.batch_size
        rows = self.order[start : start + self.plan.batch_size][part::parts]
        step = self.number * self.plan.steps_per_epoch + index
        rng = RowRng(self.plan.seed, "method", rows, step=step)
        batch = Batch(as_images(self.moved(self.images.pixels[rows], rows)), self.images.labels[rows], rng, step)
        if self.partners is None:
            return batch
        other = self.partners.batch(index, part, parts)
        return replace(batch, partners=other.x, partner_labels=other.y)

    def moved(self, pixels: Tensor, rows: Tensor) -> Tensor:
        """Return pixels (B H W ...) of these images with the augmentation of the epoch."""
        return augment.apply_moves(pixels, *self._moves(rows)) if self.augmentation else pixels

    def returned(self, pixels: Tensor, rows: Tensor) -> Tensor:
        """Return pixels (B H W ...) with the augmentation undone."""
        return augment.undo_moves(pixels, *self._moves(rows)) if self.augmentation else pixels

    def _moves(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        most = augment.max_shift(self.images.height)
        down, across, flip = self.moves[rows].unbind(1)
        mirrored = (
            (flip % 2 == 1) if augment.FLIP in self.augmentation else torch.zeros_like(flip, dtype=torch.bool)
        )
        return down % (2 * most + 1), across % (2 * most + 1), mirrored, most


def as_images(pixels: Tensor) -> Tensor:
    """Return (B H W C) pixels as images (B C H W) in [0, 1], without changing the memory order."""
    x = pixels.permute(0, 3, 1, 2)
    return x.to(torch.float32).div_(255) if x.dtype == torch.uint8 else x


def check_memory(samples: Samples, free: int, signs: int = 0) -> None:
    """Refuse a set that does not fit into half of the free memory.

    Args:
        samples: the training set.
        free: free bytes of the device.
        signs: perturbation signs stored for each pixel.

    Raises:
        UsageError: if it needs more.
    """
    pixels = samples.images([0]).numel() * len(samples)
    need = pixels + pixels * signs // SIGNS_PER_BYTE
    if need > free // 2:
        raise UsageError(
            f"{samples.name}: {len(samples)} images take {need / 2**30:.1f} GiB of memory and "
            f"{free / 2**30:.1f} GiB are free; train on fewer with --limit."
        )
