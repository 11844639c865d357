"""Random numbers by counter: a pure function of (seed, stream, sample, restart, step, position).

A sample gets the same numbers in any batch, in any order, in any process, and after resuming. The generator is
Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") in integer tensor operations,
which gives the same bits on every device.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustkit.core.devices import ComputeDevice

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
        restart: one number for all rows, or one for each (B), best on the host.
        step: likewise, so that rows in different steps can draw together.
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
        """Return the generators of these rows, by position or mask; an index on the host costs no wait for it."""
        restart, step = (
            value[index.to(value.device)] if isinstance(value, Tensor) else value
            for value in (self.restart, self.step)
        )
        ids = self.ids[ComputeDevice(self.ids.device).upload(index)]
        return replace(self, ids=ids, restart=restart, step=step)

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
        rows, blocks, ids = len(self.ids), (count + 3) // 4, self.ids.to(torch.int64)
        device = ComputeDevice(ids.device)
        restart, step = (device.upload(torch.as_tensor(value).expand(rows)) for value in (self.restart, self.step))
        block = torch.arange(blocks, device=ids.device)
        words = (block, ids[:, None], restart[:, None], step[:, None])
        out = philox([word.expand(rows, blocks) for word in words], _key(self.seed, self.stream))
        return torch.stack(out, 2).flatten(1)[:, :count]


@functools.lru_cache(maxsize=64)
def _key(seed: int, stream: str) -> tuple[int, ...]:
    digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    return tuple(int.from_bytes(digest[i : i + 4], "little") for i in (0, 4))


def philox(words: Sequence[Tensor], key: Sequence[int]) -> list[Tensor]:
    """Return Philox-4x32-10 of four counter words (int64 tensors below 2**32) under two key words.

    Both multiplications of a round are one operation on two stacked words. On a CPU numpy computes them: an
    operation on few numbers takes it a fifth of torch's time.
    """
    rounds = _rounds_table(*key)
    try:
        counters = [word.numpy() for word in words]
    except (RuntimeError, TypeError):  # on another device, or inside torch.vmap
        table = ComputeDevice(words[0].device).upload(torch.from_numpy(rounds))
        pairs = torch.stack([words[0], words[2]]), torch.stack([words[1], words[3]])
        first, second = _rounds(*pairs, table.view(11, 2, *[1] * words[0].dim()), lambda pair: pair.flip(0))
    else:
        arrays = np.stack([counters[0], counters[2]]), np.stack([counters[1], counters[3]])
        rounds = rounds.reshape(11, 2, *[1] * words[0].dim())
        first, second = map(torch.from_numpy, _rounds(*arrays, rounds, lambda pair: pair[::-1]))
    return [first[0], second[0], first[1], second[1]]


@functools.lru_cache(maxsize=64)
def _rounds_table(*key: int) -> np.ndarray:
    """Return the multipliers and the keys of each round (11 2)."""
    keys = [
        [(start + number * step) & WORD for start, step in zip(key, WEYL, strict=True)] for number in range(10)
    ]
    return np.array([MULTIPLIERS, *keys], np.int64)


def _rounds(multiplied: Any, other: Any, table: Any, flip: Callable[[Any], Any]) -> tuple[Any, Any]:
    """Return stacked words after ten rounds, as tensors or arrays; `table` is `_rounds_table`'s, to broadcast."""
    for number in range(1, 11):
        products = flip(multiplied * table[0])
        multiplied = ((products >> 32) & WORD) ^ other ^ table[number]
        other = products & WORD
    return multiplied, other
