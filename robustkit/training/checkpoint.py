"""The full state of an unfinished run, in one file that is written whole or not at all."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustkit.errors import UsageError
from robustkit.training.memory import Memory
from robustkit.training.nets import Tally
from robustkit.writing import write

FILE = "checkpoint.pt"


@dataclass
class Course:
    """How far a run is.

    Attributes:
        step: steps done.
        kept: states kept for the posterior.
        loss: sum of the losses since the epoch began, on the device; read once an epoch.
        seconds: of training, over all sittings.
        history: facts of each finished epoch.
        tally: propagations.
        counted: those that all processes know of, forwards and backwards.
    """

    loss: Tensor
    step: int = 0
    kept: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    counted: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Parts:
    """What changes as a run goes on: nets, what moves them, and what some runs have: averages, a memory."""

    nets: Sequence[nn.Module]
    optimizers: Sequence[torch.optim.Optimizer]
    averages: Sequence[dict[str, Tensor]]
    memory: Memory | None = None

    def state(self, member: int) -> dict[str, Any]:
        """Return all that is a member's own."""
        average = self.averages[member] if self.averages else {}
        return {
            "net": self.nets[member].state_dict(),
            "optimizer": self.optimizers[member].state_dict(),
            "average": average,
        }

    def take(self, member: int, state: Mapping[str, Any]) -> None:
        """Put what is a member's own in its place."""
        self.nets[member].load_state_dict(state["net"])
        self.optimizers[member].load_state_dict(state["optimizer"])
        if self.averages:
            self.averages[member].update(state["average"])


def save(folder: Path, course: Course, parts: Parts) -> None:
    """Write the checkpoint over the one before it."""
    body = {
        "step": course.step,
        "kept": course.kept,
        "loss": course.loss.cpu(),
        "seconds": course.seconds,
        "history": json.dumps(course.history),
        "forwards": course.tally.forwards,
        "backwards": course.tally.backwards,
        "nets": [net.state_dict() for net in parts.nets],
        "optimizers": [optimizer.state_dict() for optimizer in parts.optimizers],
        "averages": list(parts.averages),
        "memory": None if parts.memory is None else parts.memory.packed,
    }
    stream = io.BytesIO()
    torch.save(body, stream)
    write(folder / FILE, stream.getvalue())


def read(folder: Path) -> bytes | None:
    """Return the checkpoint's bytes; None if there is none."""
    path = folder / FILE
    return path.read_bytes() if path.is_file() else None


def load(content: bytes, folder: Path, course: Course, parts: Parts) -> None:
    """Take up a checkpoint, in place.

    Raises:
        UsageError: if it cannot be read.
    """
    try:
        body = torch.load(io.BytesIO(content), map_location=course.loss.device, weights_only=True)
        for net, state in zip(parts.nets, body["nets"], strict=True):
            net.load_state_dict(state)
        for optimizer, state in zip(parts.optimizers, body["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        for average, state in zip(parts.averages, body["averages"], strict=True):
            average.update(state)
        if parts.memory is not None:
            parts.memory.packed.copy_(body["memory"])
    # A damaged file fails in as many ways as there are bytes.
    except Exception as error:
        raise UsageError(f"{folder / FILE} cannot be read: delete it to begin again.") from error
    course.step, course.kept, course.seconds = body["step"], body["kept"], body["seconds"]
    course.loss = body["loss"]
    course.history = json.loads(body["history"])
    course.counted = course.tally.forwards, course.tally.backwards = body["forwards"], body["backwards"]
