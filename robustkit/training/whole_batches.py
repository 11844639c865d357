"""Passes over a part of a batch that give what the whole batch would: in batch norms, and in dropout's numbers.

Torch's own synchronised batch norm works on CUDA only, and has no second derivative, which `gal` and `trs` take.
Here both are functions that nets call, and are answered for them: no net is changed for it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Functions whose random numbers belong to places in the batch.
DRAWING = frozenset(
    [F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, Tensor.bernoulli_]
)


class Whole(TorchFunctionMode):
    """While it is on, images `part`, `part + parts` … are seen with the others, which other processes have.

    All processes must make the same passes in the same order.
    """

    def __init__(self, part: int, parts: int, rows: int) -> None:
        """Take which part of the batch is seen, of how many, and how many images are in it."""
        super().__init__()
        self.part, self.parts, self.rows = part, parts, rows

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer what depends on the whole batch; let everything else through."""
        if func is F.batch_norm:
            return self._normalised(*args, **(kwargs or {}))
        if func in DRAWING and args and args[0].dim() and len(args[0]) == self.rows:
            return self._drawn(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _drawn(self, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return what the whole batch would give in these places, of a function that draws for each."""
        size = [self.parts * self.rows, *x.shape[1:]]
        # Numbers are drawn along the memory, which is to be laid out alike.
        whole = torch.empty_strided(size, x.stride(), dtype=x.dtype, device=x.device).zero_()
        whole[self.part :: self.parts] = x
        found = func(whole, *args, **kwargs)[self.part :: self.parts]
        return x.copy_(found) if func is Tensor.bernoulli_ else found.clone()

    def _normalised(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, var, count = self._moments(wide)
        if running_mean is not None and running_var is not None:
            with torch.no_grad():
                running_mean.lerp_(mean.to(running_mean.dtype), momentum)
                unbiased = var * (count / torch.where(count > 1, count - 1, 1))
                running_var.lerp_(unbiased.to(running_var.dtype), momentum)
        scale = (var + eps).rsqrt() if weight is None else (var + eps).rsqrt() * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        shape = [1, -1, *[1] * (x.dim() - 2)]
        return torch.addcmul(shift.view(shape), wide, scale.view(shape)).to(x.dtype)

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean and variance of each channel (C) over the whole batch, and the number of its values."""
        channels = x.shape[1]
        var, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
        own = torch.cat([mean, var, mean.new_full((1,), x.numel() / channels)])
        # In a row of its own each part's moments are only gathered by a sum.
        parts = summed(F.pad(own[None], (0, 0, self.part, self.parts - self.part - 1)))
        means, variances, counts = torch.split(parts, [channels, channels, 1], 1)
        share = counts / counts.sum()
        middle = (share * means).sum(0)
        return middle, (share * (variances + (means - middle).square())).sum(0), counts.sum()


def summed(part: Tensor) -> Tensor:
    """Return the sum over all processes, through which gradients of any order go."""
    return _Sum.apply(part)  # type: ignore[no-any-return]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        whole = part.contiguous().clone()
        torch.distributed.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return summed(gradient)
