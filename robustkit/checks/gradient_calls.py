"""Counts gradient computations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def counted_gradient_calls() -> Iterator[list[str]]:
    """Count the calls of torch's gradient functions inside."""
    calls: list[str] = []
    places: list[tuple[Any, str]] = [
        (torch.autograd, "grad"),
        (torch.autograd, "backward"),
        (torch.Tensor, "backward"),
    ]
    originals = [getattr(owner, name) for owner, name in places]

    def noting(original: Any, name: str) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            calls.append(name)
            return original(*arguments, **more)

        return call

    try:
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, noting(original, name))
        yield calls
    finally:
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, original)
