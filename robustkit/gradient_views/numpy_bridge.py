"""Reconnects the gradients of tensors that went through numpy or Pillow and came back with the same shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from robustkit.gradient_views.findings import Findings
from robustkit.gradient_views.straight_through import rearranged
from robustkit.gradient_views.surrogate_gradients import SurrogateGradients

TO_NUMPY = (
    "numpy",
    "__array__",
    "item",
    "tolist",
    "__float__",
    "__int__",
    "__bool__",
    "__index__",
    "__complex__",
)


class NumpyBridge:
    """The tensors that left torch in a forward pass."""

    def __init__(self, surrogates: SurrogateGradients, findings: Findings) -> None:
        """Start without tensors."""
        self.surrogates, self.findings = surrogates, findings
        self._left: list[Tensor] = []

    def leave(self, name: str, func: Any, x: Tensor, args: Any, kwargs: Any) -> Any:
        """Call a function that takes a value out of torch, and record the tensor."""
        if name in ("numpy", "__array__", "tolist"):
            surrogate = self.surrogates.of(x)
            self._left.append(x if surrogate is None else surrogate)
        return func(x.detach(), *args[1:], **kwargs)

    def returned(self, name: str, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        """Return the tensor made from numbers that left torch; None for other functions."""
        if name in ("tensor", "as_tensor", "asarray") and self._left:
            real = func(*args, **kwargs)
            return self._reconnected(real)
        return None

    def _reconnected(self, real: Tensor) -> Tensor:
        for left in reversed(self._left):
            surrogate = rearranged(left, real)
            if surrogate is not None:
                self.findings.note("leaves torch")
                attached: Tensor = self.surrogates.attached(real, surrogate.to(real.device))
                return attached
        return real

    def entering(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a version of a function from arrays to tensors that reconnects gradients."""

        def enter(*args: Any, **kwargs: Any) -> Tensor:
            real = original(*args, **kwargs)
            if not torch.is_grad_enabled() or not self._left:
                return real
            with torch._C.DisableTorchFunction():
                return self._reconnected(real)

        return enter
