"""Random numbers by counter: a pure function of (seed, stream, sample, restart, step, position).

A sample gets the same numbers in any batch, in any order, in any process, and after resuming. The generator is
Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") in integer tensor operations,
which gives the same bits on every device.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)


@dataclass(frozen=True)
class RowRng:
    """One random generator per row.

    It has no state: drawing again gives the same numbers, and a uniform and a normal draw use the same words.
    For new numbers draw more at once, or use another `step`.

    Args:
        seed: seed of the run.
        stream: name of the random numbers, for example of the attack.
        ids: number (B) of each sample, below 2**32.
        restart: one number for all rows, or one for each (B).
        step: one number for all rows, or one for each (B), so that rows in different steps can draw together.
    """

    seed: int
    stream: str
    ids: Tensor
    restart: int | Tensor = 0
    step: int | Tensor = 0

    def at(self, *, restart: int | Tensor | None = None, step: int | Tensor | None = None) -> RowRng:
        """Return the generator of another restart or step."""
        return replace(
            self,
            restart=self.restart if restart is None else restart,
            step=self.step if step is None else step,
        )

    def select(self, index: Tensor) -> RowRng:
        """Return the generators of these rows, by position or mask."""
        restart, step = (
            value[index] if isinstance(value, Tensor) else value for value in (self.restart, self.step)
        )
        return replace(self, ids=self.ids[index], restart=restart, step=step)

    def uniform(self, *shape: int) -> Tensor:
        """Return float32 draws from [0, 1) in steps of 2**-24, shape (B, *shape)."""
        return (self._words(math.prod(shape)) >> 8).float().mul_(2.0**-24).view(-1, *shape)

    def normal(self, *shape: int) -> Tensor:
        """Return float32 standard normal draws (Box-Muller), shape (B, *shape)."""
        size = math.prod(shape)
        half = (size + 1) // 2
        words = self._words(2 * half)
        radius = ((words[:, :half] >> 8).float() + 0.5).mul_(2.0**-24).log_().mul_(-2).sqrt_()
        angle = (words[:, half:] >> 8).float().mul_(2.0**-24 * 2 * math.pi)
        return torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :size].reshape(-1, *shape)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Return int64 draws from 0 .. high-1, shape (B, *shape); high at most 2**31."""
        return (self._words(math.prod(shape)) * high >> 32).view(-1, *shape)

    def _words(self, count: int) -> Tensor:
        """Return `count` 32-bit words per row as int64 (B, count)."""
        digest = hashlib.sha256(f"{self.seed}/{self.stream}".encode()).digest()
        key = [int.from_bytes(digest[i : i + 4], "little") for i in (0, 4)]
        blocks = torch.arange((count + 3) // 4, device=self.ids.device)[None, :].expand(len(self.ids), -1)
        ids = self.ids.to(torch.int64)[:, None].expand_as(blocks)
        restart, step = (
            torch.zeros_like(blocks) + (value[:, None] if isinstance(value, Tensor) else value)
            for value in (self.restart, self.step)
        )
        words = philox([blocks, ids, restart, step], key)
        return torch.stack(words, 2).flatten(1)[:, :count]


def philox(words: list[Tensor], key: list[int]) -> list[Tensor]:
    """Return Philox-4x32-10 of four counter words (int64 tensors below 2**32) under two key words."""
    for _ in range(10):
        products = [words[0] * MULTIPLIERS[0], words[2] * MULTIPLIERS[1]]
        low = [p & WORD for p in products]
        top = [(p >> 32) & WORD for p in products]
        words = [top[1] ^ words[1] ^ key[0], low[1], top[0] ^ words[3] ^ key[1], low[0]]
        key = [(k + w) & WORD for k, w in zip(key, WEYL, strict=True)]
    return words
