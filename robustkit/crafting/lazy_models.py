"""Members that are loaded when they are used; one stays in memory until the next one is used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from robustkit.core.devices import ComputeDevice
from robustkit.core.isolation import evaluation_mode
from robustkit.core.memory import free_memory
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.engine.model.loaded_models import Net
from robustkit.models.classifier import Classifier


class InSlot(Protocol):
    """An object that can be loaded into a slot."""

    net: Net


# A net stays in main memory, for its next use on an accelerator, if it takes at most this share of what is free.
MAX_HOST_SHARE = 0.25


class ModelSlot:
    """Holds one loaded net; two while the next one is loaded.

    A net that leaves an accelerator stays in main memory if there is room, and is not built again.
    """

    def __init__(self, device: torch.device) -> None:
        """Start empty."""
        self.device = device
        self._member: InSlot | None = None
        self._instrumented: InstrumentedModel | None = None
        self._in_main_memory: dict[int, Classifier] = {}

    def take(self, member: InSlot) -> InstrumentedModel:
        """Return the net of this member, loaded unless it is in the slot."""
        if self._member is not member or self._instrumented is None:
            self._clear()
            model = self._in_main_memory.pop(id(member), None)
            model = member.net.load(self.device) if model is None else model.to(self.device)
            self._instrumented, self._member = member.net.instrumented(model, self.device), member
        return self._instrumented

    def _clear(self) -> None:
        """Move the loaded net to main memory, or delete it."""
        member, instrumented = self._member, self._instrumented
        self._member = self._instrumented = None
        if member is None or instrumented is None:
            return
        if member.net.model is not None:
            member.net.model.cpu()
        elif not ComputeDevice(self.device).is_cpu and member.net.parameters < MAX_HOST_SHARE * free_memory():
            self._in_main_memory[id(member)] = instrumented.model.cpu()


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
