"""Indices selected by size, as by argmax and topk, and tables indexed by them: codes and masks with gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustkit.gradient_views import smooth_rules

SELECTING = ("topk", "argmax", "argmin", "sort", "argsort", "max", "min", "kthvalue")
ALONG_LAST = ("topk", "sort", "argsort", "kthvalue")
LOOKUPS = ("embedding", "getitem", "index_select", "take")


@dataclass(frozen=True)
class Selection:
    """Indices selected from a source along a dimension.

    Args:
        source: the tensor that was selected from.
        dim: the dimension.
        values: the selected values, if there can be several.
    """

    source: Tensor
    dim: int
    values: Tensor | None

    def code(self, count: int) -> Tensor | None:
        """Return a smooth one-hot code over the last dimension; None unless the source has `count` entries."""
        if self.source.shape[self.dim] != count:
            return None
        return smooth_rules.smooth_argmax(self.source.movedim(self.dim, -1), -1)

    def mask(self) -> Tensor:
        """Return a smooth mask of the selected entries."""
        if self.values is not None and self.values.shape[self.dim] > 1:
            return smooth_rules.smooth_top_k(self.source, self.dim, self.values)
        return smooth_rules.smooth_argmax(self.source, self.dim)


def find_selection(
    name: str, real: Any, source: Tensor, args: Any, kwargs: Any
) -> tuple[Tensor, Selection] | None:
    """Return the indices in the result of a selecting function, with their selection; None without indices."""
    values, indices = (None, real) if isinstance(real, Tensor) else (real[0], real[1])
    whole = [a for a in args[1:] if isinstance(a, int) and not isinstance(a, bool)]
    whole = whole[1:] if name in ("topk", "kthvalue") else whole
    dim = kwargs.get("dim", whole[0] if whole else (-1 if name in ALONG_LAST else None))
    if dim is None or not isinstance(indices, Tensor) or indices.is_floating_point():
        return None
    return indices, Selection(
        -source if name in ("argmin", "min") else source, dim, values if name == "topk" else None
    )


def table_slope(name: str, args: Any, at: Tensor | None) -> Tensor | None:
    """Return the slope between neighbouring entries of a table times the smooth index; None without one."""
    index, table = (args[0], args[1]) if name == "embedding" else (args[-1], args[0])
    if at is None or index.dtype == torch.bool or table.requires_grad:
        return None
    high, low = (index + 1).clamp(max=len(table) - 1), (index - 1).clamp(min=0)
    slope: Tensor = (table[high] - table[low]) / 2
    return slope * at.reshape(*at.shape, *[1] * (slope.dim() - at.dim()))
