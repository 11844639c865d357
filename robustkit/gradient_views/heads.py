"""The logits inside a model: where, during a forward pass, numbers first have the shape of its answer.

What a model makes of them afterwards (temperature, softmax, rounding, noise, an aggregator over several heads) is
what hides its gradients most often.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Heads:
    """Collects results of the shape (B K) that are made of nothing of that kind, in order."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        """Take the shape of the model's answer."""
        self.shape = shape
        self.found: list[Tensor] = []
        self._derived: Any = WeakTensorKeyDictionary()

    def see(self, arguments: Any, result: Any) -> None:
        """Look at a function's arguments and result."""
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
