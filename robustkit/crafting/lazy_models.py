"""Members that are loaded when they are used; one stays in memory until the next one is used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from robustkit.core.isolation import evaluation_mode
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.engine.model.loaded_models import Net


class InSlot(Protocol):
    """An object that can be loaded into a slot."""

    net: Net


class ModelSlot:
    """Holds one loaded net; two while the next one is loaded."""

    def __init__(self, device: torch.device) -> None:
        """Start empty."""
        self.device = device
        self._member: InSlot | None = None
        self._instrumented: InstrumentedModel | None = None

    def take(self, member: InSlot) -> InstrumentedModel:
        """Return the net of this member, loaded unless it is in the slot."""
        if self._member is not member or self._instrumented is None:
            if self._member is not None and self._member.net.model is not None:
                self._member.net.model.cpu()
            self._member = self._instrumented = None
            self._instrumented, self._member = (
                member.net.instrumented(member.net.load(self.device), self.device),
                member,
            )
        return self._instrumented


class LazyModel:
    """A member of `Surrogates` that is loaded by `resident`; it counts over all its loads."""

    def __init__(self, net: Net, slot: ModelSlot) -> None:
        """Share a slot with the other members."""
        self.net, self.slot = net, slot
        self.forwards = self.backwards = 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits (B K) of images x (B C H W)."""
        with self.resident() as model:
            return model(x)

    @contextmanager
    def resident(self) -> Iterator[InstrumentedModel]:
        """Yield the loaded net."""
        instrumented = self.slot.take(self)
        forwards, backwards = instrumented.forwards, instrumented.backwards
        try:
            with evaluation_mode(instrumented.model):
                yield instrumented
        finally:
            self.forwards += instrumented.forwards - forwards
            self.backwards += instrumented.backwards - backwards
