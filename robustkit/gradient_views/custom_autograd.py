"""User-defined autograd Functions: their forward code is differentiated in place of their backward pass."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from robustkit.gradient_views.smooth_rules import identity
from robustkit.gradient_views.straight_through import with_gradient_of

# The most results that are stored, to recognise Functions whose `apply` was bound before tracing.
MAX_RECENT = 8


def is_user_defined(kind: Any) -> bool:
    """Return whether a `torch.autograd.Function` is neither torch's nor robustkit's."""
    return not kind.__module__.startswith(
        ("torch.", "robustkit.models.", "robustkit.engine.", "robustkit.gradient_views.")
    )


def run_forward(kind: Any, args: Any, kwargs: Any) -> Any:
    """Return the result of a Function's forward code; None if it has no gradient or raises an error."""
    try:
        apart = kind.setup_context is not torch.autograd.Function.setup_context
        out = kind.forward(*args, **kwargs) if apart else kind.forward(_Context(), *args, **kwargs)
        first = out if isinstance(out, Tensor) else out[0]
        return out if first.requires_grad else None
    except Exception:  # the errors of a user's code are not a closed list
        return None


class RecentResults:
    """The last results of a forward pass, to find the argument of a Function whose call was not traced."""

    def __init__(self) -> None:
        """Start empty."""
        self._results: deque[Tensor] = deque(maxlen=MAX_RECENT)

    def add(self, result: Any) -> None:
        """Store a result."""
        if isinstance(result, Tensor) and result.requires_grad:
            self._results.append(result)

    def argument(self, x: Tensor) -> tuple[Any, Tensor] | None:
        """Return the user-defined Function that made x, and its argument; None for other tensors."""
        node: Any = x.grad_fn
        if not isinstance(node, BackwardCFunction):
            return None
        kind = type(node)._forward_cls  # type: ignore[attr-defined]
        if not is_user_defined(kind):
            return None
        for before, _ in node.next_functions:
            if hasattr(before, "variable"):
                return kind, before.variable
            for result in self._results:
                if result.grad_fn is before:
                    return kind, result
        return None


def differentiated_as_written(kind: Any, real: Tensor, argument: Tensor) -> Tensor | None:
    """Return a Function's result with the gradient of its forward code, or else of its argument."""
    out = run_forward(kind, (argument,), {})
    if isinstance(out, Tensor) and out.shape == real.shape and torch.equal(out, real):
        return with_gradient_of(real, out)
    return with_gradient_of(real, identity(argument)) if argument.shape == real.shape else None


class _Context:
    """Replacement of autograd's context for a Function's forward."""

    needs_input_grad = (True,) * 32

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors

    def mark_dirty(self, *tensors: Tensor) -> None: ...

    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...
