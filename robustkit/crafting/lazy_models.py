"""Members that are in memory only while they are asked: loaded on use, and one stays until the next comes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from robustkit.core.isolation import evaluation_mode
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.engine.model.loaded_models import Net


class InSlot(Protocol):
    """What can be taken from a shelf."""

    net: Net


class ModelSlot:
    """The place for one loaded net. While the next is being loaded there are two, never more."""

    def __init__(self, device: torch.device) -> None:
        """Begin empty."""
        self.device = device
        self._of: InSlot | None = None
        self._meter: InstrumentedModel | None = None

    def take(self, member: InSlot) -> InstrumentedModel:
        """Return the net of this member, loaded unless it was the last one asked for."""
        if self._of is not member or self._meter is None:
            if self._of is not None and self._of.net.model is not None:
                self._of.net.model.cpu()
            self._of = self._meter = None
            self._meter, self._of = member.net.instrumented(member.net.load(self.device), self.device), member
        return self._meter


class LazyModel:
    """A member of `Surrogates` that is loaded by `resident`; it counts over all its loads."""

    def __init__(self, net: Net, shelf: ModelSlot) -> None:
        """Share a shelf with the other members."""
        self.net, self.shelf = net, shelf
        self.forwards = self.backwards = 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits, as any member does."""
        with self.resident() as model:
            return model(x)

    @contextmanager
    def resident(self) -> Iterator[InstrumentedModel]:
        """Give the loaded net inside."""
        instrumented = self.shelf.take(self)
        forwards, backwards = instrumented.forwards, instrumented.backwards
        try:
            with evaluation_mode(instrumented.model):
                yield instrumented
        finally:
            self.forwards += instrumented.forwards - forwards
            self.backwards += instrumented.backwards - backwards
