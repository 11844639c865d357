"""One tensor's value with another's gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Through(torch.autograd.Function):
    """The first argument's value with the second's gradient."""

    @staticmethod
    def forward(ctx: Any, real: Tensor, stand_in: Tensor) -> Tensor:
        ctx.dtype = stand_in.dtype
        return real.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0].to(ctx.dtype)


def through(real: Tensor, stand_in: Tensor) -> Tensor:
    """Return the value of the first, to the bit, with the gradient of the second."""
    return _Through.apply(real.detach(), stand_in)  # type: ignore[no-any-return]


def arranged(left: Tensor, real: Tensor) -> Tensor | None:
    """Return what left torch in the arrangement in which it came back; None if it is not the same picture.

    Channels may have moved from before the pixels to behind them, or back, and single ones come or go.
    """
    if left.shape == real.shape:
        return left * 1
    if left.numel() != real.numel():
        return None
    if sorted(left.shape) == sorted(real.shape) and left.dim() in (3, 4):
        moved = (left.movedim(-3, -1), left.movedim(-1, -3))
        return next((way for way in moved if way.shape == real.shape), None)
    sizes = [[n for n in x.shape if n > 1] for x in (left, real)]
    return left.reshape(real.shape) if sizes[0] == sizes[1] else None
