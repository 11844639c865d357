"""Numbers that leave torch, through numpy or Pillow, and come back in the same shape: they are known again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from robustkit.gradient_views.findings import Findings
from robustkit.gradient_views.straight_through import arranged
from robustkit.gradient_views.surrogate_gradients import SurrogateGradients

LEAVING = ("numpy", "__array__", "item", "tolist", "__float__", "__int__", "__bool__", "__index__", "__complex__")


class NumpyBridge:
    """What left torch in a forward pass."""

    def __init__(self, stand_ins: SurrogateGradients, mends: Findings) -> None:
        """Begin with nothing."""
        self.stand_ins, self.mends = stand_ins, mends
        self._left: list[Tensor] = []

    def leave(self, name: str, func: Any, x: Tensor, args: Any, kwargs: Any) -> Any:
        """Let a value out of torch, and remember what it was."""
        if name in ("numpy", "__array__", "tolist"):
            stand_in = self.stand_ins.of(x)
            self._left.append(x if stand_in is None else stand_in)
        return func(x.detach(), *args[1:], **kwargs)

    def returned(self, name: str, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        """Return a tensor made of numbers that left torch; None if it is none."""
        if name in ("tensor", "as_tensor", "asarray") and self._left:
            real = func(*args, **kwargs)
            return self._home(real)
        return None

    def _home(self, real: Tensor) -> Tensor:
        for left in reversed(self._left):
            stand_in = arranged(left, real)
            if stand_in is not None:
                self.mends.note("leaves torch")
                joined: Tensor = self.stand_ins.joined(real, stand_in.to(real.device))
                return joined
        return real

    def entering(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a function that makes tensors of what is no tensor, minding what left."""

        def enter(*args: Any, **kwargs: Any) -> Tensor:
            real = original(*args, **kwargs)
            if not torch.is_grad_enabled() or not self._left:
                return real
            with torch._C.DisableTorchFunction():
                return self._home(real)

        return enter
