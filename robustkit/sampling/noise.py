"""Normal noise for weights by counter: a pure function of (seed, purpose, step, position of the weight)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from robustkit.core.rng import RowRng

# Weights per draw: the counters are 64-bit, several times the memory of the weights.
CHUNK = 2**20


def normal_like(tensors: Sequence[Tensor], seed: int, stream: str, step: int) -> list[Tensor]:
    """Return standard normal draws with the shapes, types and devices of these tensors.

    A resumed run draws the same numbers at the same `step`, and so does every process of a run.
    """
    if not tensors:
        return []
    sizes = [tensor.numel() for tensor in tensors]
    device = tensors[0].device
    parts = []
    for chunk, start in enumerate(range(0, sum(sizes), CHUNK)):
        row = RowRng(seed, stream, torch.tensor([chunk], device=device), step=step)
        parts.append(row.normal(min(CHUNK, sum(sizes) - start))[0])
    drawn = torch.split(torch.cat(parts), sizes)
    return [part.view(tensor.shape).to(tensor) for part, tensor in zip(drawn, tensors, strict=True)]
