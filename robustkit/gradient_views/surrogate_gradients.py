"""Which tensors have another's gradient, at once or once they are floats again."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from robustkit.gradient_views.heads import tensors
from robustkit.gradient_views.straight_through import loosened, through


class SurrogateGradients:
    """Stand-ins by the tensor, which hold none; `chosen` are indices, with what they were chosen from."""

    def __init__(self, loose: bool) -> None:
        """Begin with none; `loose` ones give values up as well, in rows where the stand-in is near."""
        self.loose = loose
        self.chosen: Any = WeakTensorKeyDictionary()
        self._known: Any = WeakTensorKeyDictionary()

    def of(self, x: Tensor) -> Tensor | None:
        """Return a tensor's stand-in; None without one."""
        found: Tensor | None = self._known.get(x)
        return found

    def keep(self, real: Tensor, stand_in: Tensor) -> None:
        """Keep a stand-in until the tensor becomes a float again."""
        self._known[real] = stand_in

    def joined(self, real: Any, stand_in: Any) -> Any:
        """Return a result with the gradient of its stand-in: at once, or when it becomes a float again."""
        if not isinstance(real, Tensor) or not isinstance(stand_in, Tensor) or not stand_in.requires_grad:
            return real
        if real.shape != stand_in.shape:
            return real
        if real.is_floating_point():
            return loosened(real, stand_in) if self.loose else through(real, stand_in)
        self.keep(real, stand_in)
        return real

    def depends(self, values: Any) -> bool:
        """Return whether any of the values depends on the images."""
        return any(x.requires_grad or x in self._known or x in self.chosen for x in tensors(values))

    def tracked(self, values: Any) -> bool:
        """Return whether any of the values has a stand-in."""
        return any(x in self._known for x in tensors(values))

    def swapped(self, values: Any) -> Any:
        """Return the values with their stand-ins for those that have one."""
        return tree_map(lambda x: self._known.get(x, x) if isinstance(x, Tensor) else x, values)
