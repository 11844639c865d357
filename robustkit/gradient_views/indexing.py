"""Indices chosen for their size, and tables looked up by them: codes and masks with a gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustkit.gradient_views import smooth_rules

CHOOSING = ("topk", "argmax", "argmin", "sort", "argsort", "max", "min", "kthvalue")
ALONG_LAST = ("topk", "sort", "argsort", "kthvalue")
TABLES = ("embedding", "getitem", "index_select", "take")


@dataclass(frozen=True)
class Chosen:
    """Indices that were chosen among the source along a dim; `values` are the chosen, where there are several."""

    source: Tensor
    dim: int
    values: Tensor | None

    def code(self, count: int) -> Tensor | None:
        """Return the smooth one-hot code."""
        if self.source.shape[self.dim] != count:
            return None
        return smooth_rules.shares(self.source.movedim(self.dim, -1), -1)

    def mask(self) -> Tensor:
        """Return the smooth "is among the chosen"."""
        if self.values is not None and self.values.shape[self.dim] > 1:
            return smooth_rules.members(self.source, self.dim, self.values)
        return smooth_rules.shares(self.source, self.dim)


def chosen(name: str, real: Any, source: Tensor, args: Any, kwargs: Any) -> tuple[Tensor, Chosen] | None:
    """Return the indices in a choosing function's result, and what they were chosen from; None without any."""
    values, indices = (None, real) if isinstance(real, Tensor) else (real[0], real[1])
    whole = [a for a in args[1:] if isinstance(a, int) and not isinstance(a, bool)]
    whole = whole[1:] if name in ("topk", "kthvalue") else whole
    dim = kwargs.get("dim", whole[0] if whole else (-1 if name in ALONG_LAST else None))
    if dim is None or not isinstance(indices, Tensor) or indices.is_floating_point():
        return None
    return indices, Chosen(
        -source if name in ("argmin", "min") else source, dim, values if name == "topk" else None
    )


def entry(name: str, args: Any, at: Tensor | None) -> Tensor | None:
    """Return the slope between a table's neighbouring entries times the smooth index; None without such."""
    index, table = (args[0], args[1]) if name == "embedding" else (args[-1], args[0])
    if at is None or index.dtype == torch.bool or table.requires_grad:
        return None
    high, low = (index + 1).clamp(max=len(table) - 1), (index - 1).clamp(min=0)
    slope: Tensor = (table[high] - table[low]) / 2
    return slope * at.reshape(*at.shape, *[1] * (slope.dim() - at.dim()))
