"""Replacements of torch's random functions by their means, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _filled(value: float) -> Callable[..., Tensor]:
    def draw(func: Any, *args: Any, **kwargs: Any) -> Tensor:
        real: Tensor = func(*args, **kwargs)
        return real.fill_(value)

    return draw


def _middle(func: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Return the middle of the range of integers that are drawn from."""
    real: Tensor = func(*args, **kwargs)
    ends = [end for end in args if isinstance(end, int)][:2]
    low, high = (kwargs.get("low", 0), kwargs.get("high", 1)) if not ends else (0, *ends)[-2:]
    return real.fill_((low + high - 1) // 2)


def _uniform(func: Any, x: Tensor, low: float = 0, high: float = 1, **_: Any) -> Tensor:
    return x.fill_((low + high) / 2)


def _normal(func: Any, mean: Any, *rest: Any, **more: Any) -> Tensor:
    """Return the mean, in a new tensor or in the first argument."""
    if func is torch.Tensor.normal_:
        target: Tensor = mean
        return target.fill_(rest[0] if rest else more.get("mean", 0.0))
    return torch.zeros_like(func(mean, *rest, **more)).add(mean)


def _all(func: Any, x: Tensor, *rest: Any, **more: Any) -> Tensor:
    return x * 1


RANDOM_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    **dict.fromkeys(("randn", "randn_like"), _filled(0.0)),
    **dict.fromkeys(("rand", "rand_like"), _filled(0.5)),
    **dict.fromkeys(("randint", "randint_like"), _middle),
    **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout"), _all),
    "uniform": _uniform,
    "normal": _normal,
}
