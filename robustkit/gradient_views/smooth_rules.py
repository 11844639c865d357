"""Smooth substitutes of functions whose gradient is zero, missing or useless.

A rule takes the arguments of the function, with integers and booleans replaced by their smooth surrogates. It
returns a tensor of the result's shape that has a gradient, or None if the function's own gradient is fine.
Straight-through estimates are those of Bengio et al. (2013, arXiv:1308.3432) and Athalye et al. (2018,
arXiv:1802.00420). The width of a smooth step depends on the row's own scale, so that rows stay independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Rule = Callable[..., "Tensor | None"]

EPSILON = 1e-12
# Width of a smooth step, relative to the scale of its row: it broke k-winners-take-all and nets of signs.
STEP_WIDTH = 0.1
# Largest root mean square of the arguments of saturating functions; larger arguments are scaled down to it.
MAX_SPREAD = 1 / STEP_WIDTH
# The gradient of a wave with a larger range, in radians, is useless.
MAX_WAVE_RADIANS = 100.0
# Shares of clamped entries in a row above which the clamp is left out, and above which it is replaced by a step.
MIN_CLAMPED, MIN_REPLACED_SHARE = 0.5, 0.9
SIGN_TOLERANCE = 1e-2


def row_rms(x: Tensor) -> Tensor:
    """Return the root mean square of each row, without gradient, in a shape that broadcasts with x."""
    if x.dim() < 2:
        return x.detach().abs().mean().clamp(min=EPSILON)
    return x.detach().square().mean(tuple(range(1, x.dim())), keepdim=True).sqrt().clamp(min=EPSILON)


def smooth_step(x: Tensor) -> Tensor:
    """Return the smooth `x > 0`: a sigmoid whose width is a tenth of the scale of x."""
    centred = x - x.detach().mean(tuple(range(1, x.dim())), keepdim=True) if x.dim() > 1 else x
    return (x / (STEP_WIDTH * row_rms(centred))).sigmoid()


def identity(x: Tensor, *_: Any, **__: Any) -> Tensor:
    """Return x, the substitute of its rounded values."""
    return x * 1


def smooth_sign(x: Tensor) -> Tensor:
    """Return a smooth step from -1 to 1."""
    return 2 * smooth_step(x) - 1


def quotient(x: Any, y: Any, **_: Any) -> Tensor:
    """Return x / y without rounding."""
    return torch.true_divide(x, y)


def greater(x: Any, y: Any) -> Tensor:
    """Return the smooth `x > y`."""
    return smooth_step(torch.sub(_tensor(x, y), y))


def less(x: Any, y: Any) -> Tensor:
    """Return the smooth `x < y`."""
    return smooth_step(-torch.sub(_tensor(x, y), y))


def equal(x: Any, y: Any) -> Tensor:
    """Return a bump around `x == y`."""
    apart = torch.sub(_tensor(x, y), y)
    return (-(apart / row_rms(apart)).square()).exp()


def unequal(x: Any, y: Any) -> Tensor:
    """Return the smooth `x != y`."""
    return 1 - equal(x, y)


def smooth_and(x: Any, y: Any) -> Tensor:
    """Return the smooth `x and y`."""
    return torch.mul(_tensor(x, y), y)


def smooth_or(x: Any, y: Any) -> Tensor:
    """Return the smooth `x or y`."""
    return 1 - torch.mul(1 - _tensor(x, y), 1 - y)


def smooth_not(x: Tensor) -> Tensor:
    """Return the smooth `not x`."""
    return 1 - x


def where(condition: Tensor, x: Any, y: Any) -> Tensor:
    """Return the mixture of x and y; infinite values, used as masks, count as 0."""
    x, y = (torch.as_tensor(value, device=condition.device) for value in (x, y))
    share = condition.to(x.dtype if x.is_floating_point() else y.dtype)
    return _finite(x) * share + _finite(y) * (1 - share)


def filled(x: Tensor, mask: Tensor, value: Any) -> Tensor:
    """Return the smooth `masked_fill`."""
    return where(mask.to(x.dtype), value, x)


def squeezed(function: Callable[..., Tensor], wide: float = MAX_SPREAD / 2) -> Rule:
    """Return a saturating function with its argument scaled down to where it has a slope."""

    def squash(x: Tensor, *rest: Any, **more: Any) -> Tensor | None:
        excess = (row_rms(x) / wide).clamp(min=1)
        return function(x / excess, *rest, **more) if (excess > 1).any() else None

    return squash


def wave(function: Callable[..., Tensor]) -> Rule:
    """Return a periodic function without gradient in rows that cover too many periods."""

    def slow(x: Tensor) -> Tensor | None:
        noise_free = row_rms(x) < MAX_WAVE_RADIANS
        return None if noise_free.all() else torch.where(noise_free, function(x), function(x.detach()))

    return slow


def modulo(x: Tensor, y: Any = 1) -> Tensor | None:
    """Return a remainder, without its gradient where the saw has too many teeth to follow."""
    noise_free = row_rms(torch.true_divide(x, y)) < MAX_WAVE_RADIANS / (2 * math.pi)
    return (
        None
        if noise_free.all()
        else torch.where(noise_free, torch.remainder(x, y), torch.remainder(x.detach(), y))
    )


def clamped(x: Tensor, *limits: Any, **more: Any) -> Tensor | None:
    """Return x in rows of which more than half is clamped, and a smooth step where nearly all is."""
    inside = torch.clamp(x, *limits, **more)
    cut = (inside != x).detach().to(x.dtype)
    gone = cut.mean(tuple(range(1, x.dim())), keepdim=True) if x.dim() > 1 else cut
    if not (gone > MIN_CLAMPED).any():
        return None
    low, high = inside.detach().amin(), inside.detach().amax()
    wide = torch.where(gone > MIN_REPLACED_SHARE, low + (high - low) * smooth_step(x - (low + high) / 2), x)
    return torch.where(gone > MIN_CLAMPED, wide, inside)


def unit(function: Callable[..., Tensor]) -> Rule:
    """Return a rule for products and quotients that equal 1 or -1, such as x / |x|: they are signs."""

    def signed(x: Any, y: Any, **_: Any) -> Tensor | None:
        if not all(isinstance(part, Tensor) and part.requires_grad for part in (x, y)) or x.shape != y.shape:
            return None
        size = function(x, y).detach().abs()
        return smooth_sign(x) if ((size - 1).abs() < SIGN_TOLERANCE).float().mean() > MIN_REPLACED_SHARE else None

    return signed


def bucket(x: Tensor, edges: Tensor, **_: Any) -> Tensor:
    """Return the smooth index of x among edges, as if these were evenly spaced."""
    return x * (edges.shape[-1] - 1) / (edges[..., -1:] - edges[..., :1])


def smooth_argmax(x: Tensor, dim: int) -> Tensor:
    """Return a softmax of x at the scale of x: the smooth one-hot code of the largest entry."""
    apart = x - x.detach().mean(dim, keepdim=True)
    return (x / apart.detach().square().mean(dim, keepdim=True).sqrt().clamp(min=EPSILON)).softmax(dim)


def smooth_top_k(x: Tensor, dim: int, values: Tensor) -> Tensor:
    """Return the smooth mask of the selected entries, whose smallest or largest value is the threshold."""
    largest = bool((values.mean() >= x.mean()).item())
    threshold = (values.amin(dim, keepdim=True) if largest else values.amax(dim, keepdim=True)).detach()
    return greater(x, threshold) if largest else less(x, threshold)


def smooth_one_hot(x: Tensor, count: int) -> Tensor:
    """Return the smooth one-hot code of x: bumps around the integers below `count`."""
    centres = torch.arange(count, device=x.device, dtype=x.dtype)
    return (-(x[..., None] - centres).square() / 2).exp()


def _finite(x: Tensor) -> Tensor:
    return torch.nan_to_num(x, 0.0, 0.0, 0.0) if x.is_floating_point() else x


def _tensor(x: Any, like: Any) -> Tensor:
    return x if isinstance(x, Tensor) else torch.as_tensor(x, dtype=like.dtype, device=like.device)


RULES: dict[str, tuple[Rule, str]] = {
    **{
        name: (identity, "rounds")
        for name in (
            *("round", "floor", "ceil", "trunc", "fix"),
            *("fake_quantize_per_tensor_affine", "fake_quantize_per_channel_affine", "bernoulli", "poisson"),
        )
    },
    **{name: (quotient, "rounds") for name in ("floor_divide", "floordiv")},
    "bucketize": (bucket, "rounds"),
    "searchsorted": (lambda edges, x, **more: bucket(x, edges), "rounds"),
    **{name: (smooth_sign, "takes signs") for name in ("sign", "sgn")},
    "heaviside": (lambda x, values: smooth_step(x), "takes steps"),
    **{name: (greater, "compares") for name in ("gt", "ge", "greater", "greater_equal")},
    **{name: (less, "compares") for name in ("lt", "le", "less", "less_equal")},
    "eq": (equal, "compares"),
    "ne": (unequal, "compares"),
    **{name: (squeezed(getattr(torch, name)), "saturates") for name in ("tanh", "erf", "atan")},
    "sigmoid": (squeezed(torch.sigmoid, MAX_SPREAD), "saturates"),
    "softmax": (squeezed(F.softmax, MAX_SPREAD), "saturates"),
    "hardtanh": (squeezed(F.hardtanh), "saturates"),
    "hardsigmoid": (squeezed(F.hardsigmoid), "saturates"),
    "softsign": (squeezed(F.softsign), "saturates"),
    "sin": (wave(torch.sin), "oscillates"),
    "cos": (wave(torch.cos), "oscillates"),
    **{name: (modulo, "oscillates") for name in ("remainder", "fmod", "mod", "frac")},
    "mul": (unit(torch.mul), "takes signs"),
    **{name: (unit(torch.true_divide), "takes signs") for name in ("div", "true_divide", "truediv")},
    **{name: (clamped, "clamps") for name in ("clamp", "clip")},
}

# Rules for booleans that have smooth surrogates.
LOGIC: dict[str, Rule] = {
    **dict.fromkeys(("logical_and", "and", "bitwise_and"), smooth_and),
    **dict.fromkeys(("logical_or", "or", "bitwise_or"), smooth_or),
    **dict.fromkeys(("logical_not", "invert", "bitwise_not"), smooth_not),
    "where": where,
    "masked_fill": filled,
}
