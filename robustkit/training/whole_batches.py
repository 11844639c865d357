"""Passes over a part of a batch with the batch norm statistics and dropout masks of the whole batch.

Torch's synchronised batch norm works on CUDA only and has no second derivative, which `gal` and `trs` need.
Here the functions that nets call are replaced while they run, so that no net has to be changed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Functions that draw random numbers for each position in the batch.
DRAWING = frozenset(
    [F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, Tensor.bernoulli_]
)


class WholeBatchMode(TorchFunctionMode):
    """Inside the context, images `part`, `part + parts` … are processed as part of the whole batch.

    The other images are in other processes. All processes must run the same passes in the same order.

    Args:
        part: index of this process's part of the batch.
        parts: number of parts.
        rows: images in this part.
    """

    def __init__(self, part: int, parts: int, rows: int) -> None:
        """Set the part of the batch that this process has."""
        super().__init__()
        self.part, self.parts, self.rows = part, parts, rows

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute batch norms and random draws for the whole batch; call all other functions unchanged."""
        if func is F.batch_norm:
            return self._normalised(*args, **(kwargs or {}))
        if func in DRAWING and args and args[0].dim() and len(args[0]) == self.rows:
            return self._drawn(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _drawn(self, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return these rows of a random function's result on the whole batch."""
        size = [self.parts * self.rows, *x.shape[1:]]
        # Random numbers are drawn in memory order, so the memory format has to be the same.
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
        # Each part has a row of its own, so that the sum over processes gathers the moments.
        parts = sum_over_processes(F.pad(own[None], (0, 0, self.part, self.parts - self.part - 1)))
        means, variances, counts = torch.split(parts, [channels, channels, 1], 1)
        group = counts / counts.sum()
        middle = (group * means).sum(0)
        return middle, (group * (variances + (means - middle).square())).sum(0), counts.sum()


def sum_over_processes(part: Tensor) -> Tensor:
    """Return the sum over all processes, differentiable any number of times."""
    return _Sum.apply(part)  # type: ignore[no-any-return]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        whole = part.contiguous().clone()
        torch.distributed.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return sum_over_processes(gradient)
