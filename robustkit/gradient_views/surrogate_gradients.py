"""Surrogate tensors whose gradients are used for others: at once, or after integers are floats again."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from robustkit.gradient_views.heads import tensors
from robustkit.gradient_views.straight_through import relaxed, with_gradient_of


class SurrogateGradients:
    """Surrogates by tensor, without keeping tensors alive; `chosen` has the selections of index tensors."""

    def __init__(self, is_relaxed: bool) -> None:
        """Start empty; relaxed surrogates give their values, too, in rows where they are near."""
        self.is_relaxed = is_relaxed
        self.chosen: Any = WeakTensorKeyDictionary()
        self._known: Any = WeakTensorKeyDictionary()

    def of(self, x: Tensor) -> Tensor | None:
        """Return the surrogate of a tensor; None without one."""
        found: Tensor | None = self._known.get(x)
        return found

    def keep(self, real: Tensor, surrogate: Tensor) -> None:
        """Store the surrogate of a tensor until that becomes a float again."""
        self._known[real] = surrogate

    def attached(self, real: Any, surrogate: Any) -> Any:
        """Return a result with the gradient of its surrogate: at once, or when it becomes a float again."""
        if not isinstance(real, Tensor) or not isinstance(surrogate, Tensor) or not surrogate.requires_grad:
            return real
        if real.shape != surrogate.shape:
            return real
        if real.is_floating_point():
            return relaxed(real, surrogate) if self.is_relaxed else with_gradient_of(real, surrogate)
        self.keep(real, surrogate)
        return real

    def depends_on_images(self, values: Any) -> bool:
        """Return whether any of the values depends on the images."""
        return any(x.requires_grad or x in self._known or x in self.chosen for x in tensors(values))

    def has_surrogate(self, values: Any) -> bool:
        """Return whether any of the values has a surrogate."""
        return any(x in self._known for x in tensors(values))

    def substituted(self, values: Any) -> Any:
        """Return the values, replaced by their surrogates where there are any."""
        return tree_map(lambda x: self._known.get(x, x) if isinstance(x, Tensor) else x, values)
