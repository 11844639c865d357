"""Vector-Jacobian products without `grad_outputs` of torch.autograd.grad, whose first use imports sympy: 0.4 s."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def vector_jacobian(output: Tensor, point: Tensor, vector: Tensor, *, retain_graph: bool = False) -> Tensor:
    """Return the product of a vector and the Jacobian of an output, by one backward pass.

    Args:
        output: computed from `point` with gradients on.
        point: the tensor to differentiate in.
        vector: of the shape and type of `output`; a constant.
        retain_graph: whether another backward pass follows.

    Returns:
        A tensor of the shape of `point`; zeros if the output does not depend on it.
    """
    with torch.enable_grad():
        product = _Product.apply(output, vector.detach())
    (gradient,) = torch.autograd.grad(product, point, retain_graph=retain_graph, allow_unused=True)
    return torch.zeros_like(point) if gradient is None else gradient


class _Product(torch.autograd.Function):
    """A scalar whose gradient in the output is the vector; its value is never used."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, vector: Tensor) -> Tensor:
        ctx.vector = vector
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.vector, None
