"""Functions with a backward pass of their own: differentiated as their forward is written, not as they say."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from robustkit.gradient_views.smooth_rules import same
from robustkit.gradient_views.straight_through import through

# What a forward pass is remembered by, for Functions whose `apply` somebody took hold of before.
RECENT = 8


def foreign(kind: Any) -> bool:
    """Return whether a `torch.autograd.Function` is neither torch's nor ours."""
    return not kind.__module__.startswith(
        ("torch.", "robustkit.models.", "robustkit.engine.", "robustkit.gradient_views.")
    )


def forward_of(kind: Any, args: Any, kwargs: Any) -> Any:
    """Return the Function's forward as written; None if its result has no gradient then, or it fails."""
    try:
        apart = kind.setup_context is not torch.autograd.Function.setup_context
        out = kind.forward(*args, **kwargs) if apart else kind.forward(_Context(), *args, **kwargs)
        first = out if isinstance(out, Tensor) else out[0]
        return out if first.requires_grad else None
    except Exception:  # whatever a stranger's code may raise where it is not run as it expects
        return None


class Recent:
    """The last few results of a forward pass, to find what a Function was given that nobody saw being called."""

    def __init__(self) -> None:
        """Begin with none."""
        self._results: deque[Tensor] = deque(maxlen=RECENT)

    def add(self, result: Any) -> None:
        """Remember a result."""
        if isinstance(result, Tensor) and result.requires_grad:
            self._results.append(result)

    def argument(self, x: Tensor) -> tuple[Any, Tensor] | None:
        """Return the foreign Function that made x, and what it was given; None if x is something else."""
        node: Any = x.grad_fn
        if not isinstance(node, BackwardCFunction):
            return None
        kind = type(node)._forward_cls  # type: ignore[attr-defined]
        if not foreign(kind):
            return None
        for before, _ in node.next_functions:
            if hasattr(before, "variable"):
                return kind, before.variable
            for result in self._results:
                if result.grad_fn is before:
                    return kind, result
        return None


def rewritten(kind: Any, real: Tensor, argument: Tensor) -> Tensor | None:
    """Return a Function's result with the gradient of its forward; of its argument where that cannot be had."""
    out = forward_of(kind, (argument,), {})
    if isinstance(out, Tensor) and out.shape == real.shape and torch.equal(out, real):
        return through(real, out)
    return through(real, same(argument)) if argument.shape == real.shape else None


class _Context:
    """What a Function's forward is given in place of autograd's context."""

    needs_input_grad = (True,) * 32

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors

    def mark_dirty(self, *tensors: Tensor) -> None: ...

    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...
