"""One tensor's value with another's gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NEAR = 0.5


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


def loosened(real: Tensor, stand_in: Tensor) -> Tensor:
    """Return the second in rows where it is within half of the first's spread, the first's value elsewhere."""
    if real.dim() < 2:
        return through(real, stand_in)
    axes = tuple(range(1, real.dim()))
    apart = (real - stand_in).detach().square().mean(axes, keepdim=True)
    near = apart < NEAR**2 * real.detach().square().mean(axes, keepdim=True)
    return torch.where(near, stand_in.to(real.dtype), through(real, stand_in))


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
