"""For functions whose gradient is zero, missing or useless: a smooth one beside each, to differentiate instead.

A rule takes the arguments of the function, ints and booleans replaced by the smooth numbers that they stand for,
and returns something of the result's shape with a gradient, or None where the function's own will do.
Straight-through estimates are those of Bengio et al. (2013, arXiv:1308.3432) and Athalye et al. (2018,
arXiv:1802.00420). How wide a step is smeared goes by each row's own spread, so rows stay independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Rule = Callable[..., "Tensor | None"]

TINY = 1e-12
# How wide a step is smeared, in spreads of its row: the width that broke k-winners-take-all and nets of signs.
WIDTH = 0.1
# Squashing functions are left alone while their arguments spread no wider; wider ones are squeezed to this.
WIDE = 1 / WIDTH
# A wave of so many radians has a slope that tells nothing of where it leads.
SHATTERED = 100.0
# Shares of a row that a clamp cuts off from which it is left out, and taken for a step.
MOST_CUT, ALL_CUT = 0.5, 0.9
NEARLY = 1e-2


def spread(x: Tensor) -> Tensor:
    """Return the root mean square of each row, in a shape that divides x; no gradient."""
    if x.dim() < 2:
        return x.detach().abs().mean().clamp(min=TINY)
    return x.detach().square().mean(tuple(range(1, x.dim())), keepdim=True).sqrt().clamp(min=TINY)


def step(x: Tensor) -> Tensor:
    """Return a sigmoid a tenth as wide as x spreads: what stands for `x > 0`."""
    centred = x - x.detach().mean(tuple(range(1, x.dim())), keepdim=True) if x.dim() > 1 else x
    return (x / (WIDTH * spread(centred))).sigmoid()


def same(x: Tensor, *_: Any, **__: Any) -> Tensor:
    """Return x: what stands for its rounded values."""
    return x * 1


def sign(x: Tensor) -> Tensor:
    """Return a step from -1 to 1."""
    return 2 * step(x) - 1


def quotient(x: Any, y: Any, **_: Any) -> Tensor:
    """Return x / y, whatever is rounded."""
    return torch.true_divide(x, y)


def greater(x: Any, y: Any) -> Tensor:
    """Return the smooth `x > y`."""
    return step(torch.sub(_tensor(x, y), y))


def less(x: Any, y: Any) -> Tensor:
    """Return the smooth `x < y`."""
    return step(-torch.sub(_tensor(x, y), y))


def equal(x: Any, y: Any) -> Tensor:
    """Return a bump around `x == y`."""
    apart = torch.sub(_tensor(x, y), y)
    return (-(apart / spread(apart)).square()).exp()


def unequal(x: Any, y: Any) -> Tensor:
    """Return the smooth `x != y`."""
    return 1 - equal(x, y)


def both(x: Any, y: Any) -> Tensor:
    """Return the smooth `x and y`."""
    return torch.mul(_tensor(x, y), y)


def either(x: Any, y: Any) -> Tensor:
    """Return the smooth `x or y`."""
    return 1 - torch.mul(1 - _tensor(x, y), 1 - y)


def neither(x: Tensor) -> Tensor:
    """Return the smooth `not x`."""
    return 1 - x


def where(condition: Tensor, x: Any, y: Any) -> Tensor:
    """Return the mixture of x and y; infinities, which mean "none of this", do not mix."""
    x, y = (torch.as_tensor(of, device=condition.device) for of in (x, y))
    share = condition.to(x.dtype if x.is_floating_point() else y.dtype)
    return _finite(x) * share + _finite(y) * (1 - share)


def filled(x: Tensor, mask: Tensor, value: Any) -> Tensor:
    """Return x mixed with the value where it is filled in."""
    return where(mask.to(x.dtype), value, x)


def squeezed(function: Callable[..., Tensor], wide: float = WIDE / 2) -> Rule:
    """Return a squashing function whose argument is brought to where it has a slope."""

    def squash(x: Tensor, *rest: Any, **more: Any) -> Tensor | None:
        excess = (spread(x) / wide).clamp(min=1)
        return function(x / excess, *rest, **more) if (excess > 1).any() else None

    return squash


def wave(function: Callable[..., Tensor]) -> Rule:
    """Return a wave without its gradient where it has too many crests to follow."""

    def slow(x: Tensor) -> Tensor | None:
        calm = spread(x) < SHATTERED
        return None if calm.all() else torch.where(calm, function(x), function(x.detach()))

    return slow


def modulo(x: Tensor, y: Any = 1) -> Tensor | None:
    """Return a remainder, without its gradient where the saw has too many teeth to follow."""
    calm = spread(torch.true_divide(x, y)) < SHATTERED / (2 * math.pi)
    return None if calm.all() else torch.where(calm, torch.remainder(x, y), torch.remainder(x.detach(), y))


def clamped(x: Tensor, *limits: Any, **more: Any) -> Tensor | None:
    """Return x itself in rows of which more than half is cut off; a step where next to nothing is left."""
    inside = torch.clamp(x, *limits, **more)
    cut = (inside != x).detach().to(x.dtype)
    gone = cut.mean(tuple(range(1, x.dim())), keepdim=True) if x.dim() > 1 else cut
    if not (gone > MOST_CUT).any():
        return None
    low, high = inside.detach().amin(), inside.detach().amax()
    wide = torch.where(gone > ALL_CUT, low + (high - low) * step(x - (low + high) / 2), x)
    return torch.where(gone > MOST_CUT, wide, inside)


def unit(function: Callable[..., Tensor]) -> Rule:
    """Return a product or quotient that comes out at 1 and -1 as a sign: x / |x| and the like."""

    def signed(x: Any, y: Any, **_: Any) -> Tensor | None:
        if not all(isinstance(part, Tensor) and part.requires_grad for part in (x, y)) or x.shape != y.shape:
            return None
        size = function(x, y).detach().abs()
        return sign(x) if ((size - 1).abs() < NEARLY).float().mean() > ALL_CUT else None

    return signed


def bucket(x: Tensor, edges: Tensor, **_: Any) -> Tensor:
    """Return where x is among edges, as if they were evenly spread."""
    return x * (edges.shape[-1] - 1) / (edges[..., -1:] - edges[..., :1])


def shares(x: Tensor, dim: int) -> Tensor:
    """Return a softmax with a slope: what stands for the largest of x."""
    apart = x - x.detach().mean(dim, keepdim=True)
    return (x / apart.detach().square().mean(dim, keepdim=True).sqrt().clamp(min=TINY)).softmax(dim)


def members(x: Tensor, dim: int, values: Tensor) -> Tensor:
    """Return the smooth "x is among the chosen ones", whose smallest or largest is the threshold."""
    largest = bool((values.mean() >= x.mean()).item())
    threshold = (values.amin(dim, keepdim=True) if largest else values.amax(dim, keepdim=True)).detach()
    return greater(x, threshold) if largest else less(x, threshold)


def levels(x: Tensor, count: int) -> Tensor:
    """Return bumps around the whole numbers below count: what stands for a one-hot code of x."""
    at = torch.arange(count, device=x.device, dtype=x.dtype)
    return (-(x[..., None] - at).square() / 2).exp()


def _finite(x: Tensor) -> Tensor:
    return torch.nan_to_num(x, 0.0, 0.0, 0.0) if x.is_floating_point() else x


def _tensor(x: Any, like: Any) -> Tensor:
    return x if isinstance(x, Tensor) else torch.as_tensor(x, dtype=like.dtype, device=like.device)


RULES: dict[str, tuple[Rule, str]] = {
    **{
        name: (same, "rounds")
        for name in (
            *("round", "floor", "ceil", "trunc", "fix"),
            *("fake_quantize_per_tensor_affine", "fake_quantize_per_channel_affine", "bernoulli", "poisson"),
        )
    },
    **{name: (quotient, "rounds") for name in ("floor_divide", "floordiv")},
    "bucketize": (bucket, "rounds"),
    "searchsorted": (lambda edges, x, **more: bucket(x, edges), "rounds"),
    **{name: (sign, "takes signs") for name in ("sign", "sgn")},
    "heaviside": (lambda x, values: step(x), "takes steps"),
    **{name: (greater, "compares") for name in ("gt", "ge", "greater", "greater_equal")},
    **{name: (less, "compares") for name in ("lt", "le", "less", "less_equal")},
    "eq": (equal, "compares"),
    "ne": (unequal, "compares"),
    **{name: (squeezed(getattr(torch, name)), "saturates") for name in ("tanh", "erf", "atan")},
    "sigmoid": (squeezed(torch.sigmoid, WIDE), "saturates"),
    "softmax": (squeezed(F.softmax, WIDE), "saturates"),
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

# Of booleans that stand for smooth numbers.
LOGIC: dict[str, Rule] = {
    **dict.fromkeys(("logical_and", "and", "bitwise_and"), both),
    **dict.fromkeys(("logical_or", "or", "bitwise_or"), either),
    **dict.fromkeys(("logical_not", "invert", "bitwise_not"), neither),
    "where": where,
    "masked_fill": filled,
}
