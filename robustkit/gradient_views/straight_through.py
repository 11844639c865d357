"""The value of one tensor with the gradient of another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# A surrogate's value is near if its distance is below this share of the root mean square of the row.
MAX_RELATIVE_DISTANCE = 0.5


class _Through(torch.autograd.Function):
    """The value of the first argument with the gradient of the second."""

    @staticmethod
    def forward(ctx: Any, real: Tensor, surrogate: Tensor) -> Tensor:
        ctx.dtype = surrogate.dtype
        return real.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0].to(ctx.dtype)


def with_gradient_of(real: Tensor, surrogate: Tensor) -> Tensor:
    """Return the value of the first tensor, bit for bit, with the gradient of the second."""
    return _Through.apply(real.detach(), surrogate)  # type: ignore[no-any-return]


def relaxed(real: Tensor, surrogate: Tensor) -> Tensor:
    """Return the surrogate's value in rows where it is near, the first tensor's elsewhere; gradients as above."""
    if real.dim() < 2:
        return with_gradient_of(real, surrogate)
    axes = tuple(range(1, real.dim()))
    apart = (real - surrogate).detach().square().mean(axes, keepdim=True)
    near = apart < MAX_RELATIVE_DISTANCE**2 * real.detach().square().mean(axes, keepdim=True)
    return torch.where(near, surrogate.to(real.dtype), with_gradient_of(real, surrogate))


def rearranged(left: Tensor, real: Tensor) -> Tensor | None:
    """Return a tensor that left torch in the arrangement in which it came back; None if it is another one.

    Channels may have moved before or after the pixels, and dimensions of size 1 may have been added or removed.
    """
    if left.shape == real.shape:
        return left * 1
    if left.numel() != real.numel():
        return None
    if sorted(left.shape) == sorted(real.shape) and left.dim() in (3, 4):
        moved = (left.movedim(-3, -1), left.movedim(-1, -3))
        return next((candidate for candidate in moved if candidate.shape == real.shape), None)
    sizes = [[n for n in x.shape if n > 1] for x in (left, real)]
    return left.reshape(real.shape) if sizes[0] == sizes[1] else None
