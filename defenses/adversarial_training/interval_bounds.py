"""Interval bound propagation (Gowal et al. 2018, arXiv:1810.12715): bounds of logits over a box of images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from robustkit.core.errors import UsageError


class Interval(Tensor):
    """Intervals as an input of nets: a tensor of their centres, with their half widths as `radius`.

    It supports affine layers, batch norms, poolings and monotonically rising activations; other operations raise a
    UsageError. A batch norm in train mode uses the statistics of the centres.
    """

    radius: Tensor

    @staticmethod
    def of(centre: Tensor, radius: Tensor) -> Interval:
        """Return intervals around centres; both arguments have one shape."""
        interval = centre.as_subclass(Interval)
        interval.radius = radius
        return interval

    @staticmethod
    def between(lower: Tensor, upper: Tensor) -> Interval:
        """Return the intervals with these ends; both arguments have one shape."""
        return Interval.of((lower + upper) / 2, (upper - lower) / 2)

    @property
    def centre(self) -> Tensor:
        """The centres, as a plain tensor."""
        return self.as_subclass(Tensor)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute one operation on intervals."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            rule = _RULES.get(func)
            if rule is not None:
                return rule(func, *args, **kwargs)
            result = func(*(_plain(arg) for arg in args), **kwargs)
            if func in _QUESTIONS or not isinstance(result, Tensor):
                return result
        name = getattr(func, "__name__", str(func))
        raise UsageError(
            f"interval bounds do not pass through {name!r}: use a net of convolutions, linear layers, batch "
            "norms, poolings and ReLUs."
        )


def bounds(net: Callable[[Tensor], Tensor], x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return lower and upper bounds (B K) of a net's logits.

    Args:
        net: function from images in [0, 1] to logits (B K).
        x: images (B C H W).
        eps: radius of the linf ball, of which the part inside [0, 1] is used.

    Raises:
        UsageError: the net has an operation without interval bounds.
    """
    logits = net(Interval.between((x - eps).clamp(min=0), (x + eps).clamp(max=1)))
    if not isinstance(logits, Interval):
        raise UsageError("the logits of the net do not depend on its images, so they have no interval bounds.")
    return logits.centre - logits.radius, logits.centre + logits.radius


def _plain(value: Any) -> Any:
    return value.centre if isinstance(value, Interval) else value


def _radius(value: Any) -> Any:
    return value.radius if isinstance(value, Interval) else 0


def _affine(
    func: Callable[..., Tensor], x: Interval, weight: Tensor, bias: Any = None, *args: Any, **kw: Any
) -> Any:
    return Interval.of(func(x.centre, weight, bias, *args, **kw), func(x.radius, weight.abs(), None, *args, **kw))


def _same(func: Callable[..., Tensor], x: Interval, *args: Any, **kw: Any) -> Any:
    """Apply a linear operation with non-negative weights: a change of shape, a mean, a sum."""
    return Interval.of(func(x.centre, *args, **kw), func(x.radius, *args, **kw))


def _rising(func: Callable[..., Tensor], x: Interval, *args: Any, **kw: Any) -> Any:
    lower = func(x.centre - x.radius, *args, **{**kw, "inplace": False} if "inplace" in kw else kw)
    upper = func(x.centre + x.radius, *args, **{**kw, "inplace": False} if "inplace" in kw else kw)
    return Interval.between(lower, upper)


def _sum(func: Callable[..., Tensor], one: Any, other: Any, *, alpha: float = 1) -> Any:
    return Interval.of(
        func(_plain(one), alpha * _plain(other)), torch.add(_radius(one), abs(alpha) * _radius(other))
    )


def _negated(func: Callable[..., Tensor], x: Interval) -> Any:
    return Interval.of(func(x.centre), x.radius)


def _padded(func: Callable[..., Tensor], x: Interval, pad: Any, mode: str = "constant", value: Any = None) -> Any:
    return Interval.of(func(x.centre, pad, mode, value), func(x.radius, pad, mode, 0 if value else value))


def _dropped(func: Callable[..., Tensor], x: Interval, p: float = 0.5, training: bool = True, **_: Any) -> Any:
    kept = func(torch.ones_like(x.centre), p, training)
    return Interval.of(x.centre * kept, x.radius * kept)


def _scaled(func: Callable[..., Tensor], one: Any, other: Any) -> Any:
    if isinstance(one, Interval) and isinstance(other, Interval):
        raise UsageError("interval bounds do not pass through a product of two activations: use another net.")
    return Interval.of(func(_plain(one), _plain(other)), func(_size(one), _size(other)).abs())


def _size(value: Any) -> Any:
    return value.radius if isinstance(value, Interval) else value


def _normed(
    func: Callable[..., Tensor],
    x: Interval,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    **_: Any,
) -> Any:
    dims = [0, *range(2, x.ndim)]
    own = x.centre.var(dims, unbiased=False) if training or variance is None else variance
    scale = (own + eps).rsqrt() * (1 if weight is None else weight.abs())
    centre = F.batch_norm(x.centre, mean, variance, weight, bias, training, momentum, eps)
    return Interval.of(centre, x.radius * scale.view(1, -1, *[1] * (x.ndim - 2)))


_LINEAR = (F.linear, F.conv2d, F.conv1d, F.conv3d)
_SHAPES = (
    *(torch.flatten, Tensor.flatten, Tensor.view, Tensor.reshape, torch.reshape, Tensor.permute, Tensor.transpose),
    *(
        Tensor.contiguous,
        Tensor.float,
        Tensor.to,
        Tensor.__getitem__,
        Tensor.squeeze,
        Tensor.unsqueeze,
        Tensor.clone,
    ),
    *(Tensor.mean, torch.mean, Tensor.sum, F.avg_pool2d, F.adaptive_avg_pool2d, Tensor.detach),
)
_MONOTONE = (
    *(F.relu, torch.relu, Tensor.relu, F.leaky_relu, F.elu, F.softplus, torch.sigmoid, Tensor.sigmoid),
    *(torch.tanh, Tensor.tanh, F.max_pool2d, F.adaptive_max_pool2d, F.hardtanh, Tensor.clamp, torch.clamp),
)
_SUMS = (
    *(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__),
    *(torch.sub, Tensor.sub, Tensor.__sub__, Tensor.__rsub__),
)
_PRODUCTS = (
    *(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__),
    *(torch.div, Tensor.div, Tensor.__truediv__),
)
_RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(_LINEAR, _affine),
    **dict.fromkeys(_SHAPES, _same),
    **dict.fromkeys(_MONOTONE, _rising),
    **dict.fromkeys(_SUMS, _sum),
    **dict.fromkeys(_PRODUCTS, _scaled),
    **dict.fromkeys((torch.neg, Tensor.neg, Tensor.__neg__), _negated),
    F.batch_norm: _normed,
    F.pad: _padded,
    F.dropout: _dropped,
}
_QUESTIONS = (
    Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    Tensor.register_hook,
)
