"""The logits inside a model: the first tensors of a forward pass that have the shape of its output.

The operations after them (temperature, softmax, rounding, noise, an aggregator over several heads) are the most
common cause of hidden gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Heads:
    """Collects, in order, results of shape (B K) that do not depend on other such results."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        """Set the shape (B K) of the model's output."""
        self.shape = shape
        self.found: list[Tensor] = []
        self._derived: Any = WeakTensorKeyDictionary()

    def see(self, arguments: Any, result: Any) -> None:
        """Record the arguments and the result of a function."""
        derived = any(x in self._derived for x in tensors(arguments))
        for x in tensors(result):
            if x in self._derived:
                continue
            if derived:
                self._derived[x] = True
            elif x.shape == self.shape and x.is_floating_point() and x.requires_grad:
                self._derived[x] = True
                self.found.append(x)


def tensors(values: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and dicts."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from tensors(value)
    elif isinstance(values, dict):
        for value in values.values():
            yield from tensors(value)
