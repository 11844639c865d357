"""The full state of an unfinished run, in one file that is written whole or not at all; the one before it is kept.

A file holds the sha256 of its content, and nothing goes on from one that has changed.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustkit.core.errors import UsageError
from robustkit.core.writing import replacing
from robustkit.posterior.digest import digest
from robustkit.runs.training_record import CHECKPOINTS
from robustkit.training.memory import Memory
from robustkit.training.method import Method, Plan
from robustkit.training.nets import Tally
from robustkit.training.posterior_method import kept_steps

FILE, PREVIOUS = CHECKPOINTS


@dataclass
class TrainState:
    """How far a run is.

    Attributes:
        step: steps done.
        kept: states kept for the posterior.
        loss: sum of the losses since the epoch began, on the device; read once an epoch.
        seconds: of training, over all sittings.
        history: facts of each finished epoch.
        tally: propagations.
        counted: those that all processes know of, forwards and backwards.
        parts: which versions made which steps (`robustkit.runs.versions`).
    """

    loss: Tensor
    step: int = 0
    kept: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    counted: tuple[int, int] = (0, 0)
    parts: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class ModelState:
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


def save(folder: Path, course: TrainState, parts: ModelState) -> None:
    """Write the checkpoint; the one before it stays, in case this one gets damaged."""
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
        "parts": json.dumps(course.parts),
    }
    body["sha256"] = digest(body)
    with replacing(folder / FILE, folder / PREVIOUS) as stream:
        torch.save(body, stream)


@dataclass(frozen=True)
class Found:
    """The bytes of the newest sound checkpoint; `damaged` says what is wrong with a newer one, if anything."""

    content: bytes
    damaged: str = ""


def read(folder: Path, method: Method, plan: Plan) -> Found | None:
    """Return the newest checkpoint that is sound; None if there is none at all. A damaged newer one is removed.

    Raises:
        UsageError: if all there are are damaged.
    """
    damaged = ""
    for path in (folder / FILE, folder / PREVIOUS):
        if not path.is_file():
            continue
        content = path.read_bytes()
        if why := _fault(content, method, plan):
            damaged = damaged or f"{path} is damaged: {why}"
            continue
        if damaged:
            (folder / FILE).unlink()
        return Found(content, damaged)
    if damaged:
        raise UsageError(f"{damaged}; delete it to begin again, or begin again with --overwrite.")
    return None


def _fault(content: bytes, method: Method, plan: Plan) -> str:
    """Return what is wrong with a checkpoint's bytes, nothing if it is sound."""
    try:
        body = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        said = body.pop("sha256", None)
        if digest(body) != said:
            return "its content does not match its sha256"
        step, kept, history = body["step"], body["kept"], json.loads(body["history"])
        if not (type(step) is int and 0 <= step <= plan.steps):
            return f"step is {step!r}, and must be from 0 to {plan.steps}"
        wanted = {
            "kept": (kept, len(kept_steps(method, plan, step))),
            "epochs": (len(history), step // plan.steps_per_epoch),
        }
        for name, (found, right) in wanted.items():
            if type(found) is not int or found != right:
                return f"{name} is {found!r}, and must be {right} at step {step}"
        for name in ("seconds", "forwards", "backwards"):
            if not 0 <= body[name] < math.inf:
                return f"{name} is {body[name]!r}, and must be a number from 0 up"
        if not math.isfinite(float(body["loss"])):
            return f"loss is {float(body['loss'])}, and must be finite"
    # A damaged file fails in as many ways as there are bytes.
    except Exception as error:
        return f"it cannot be read ({type(error).__name__})"
    return ""


def load(content: bytes, folder: Path, course: TrainState, parts: ModelState) -> None:
    """Take up a checkpoint that is sound, in place.

    Raises:
        UsageError: if it does not fit the nets.
    """
    body = torch.load(io.BytesIO(content), map_location=course.loss.device, weights_only=True)
    try:
        for net, state in zip(parts.nets, body["nets"], strict=True):
            net.load_state_dict(state)
        for optimizer, state in zip(parts.optimizers, body["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        for average, state in zip(parts.averages, body["averages"], strict=True):
            average.update(state)
        if parts.memory is not None:
            parts.memory.packed.copy_(body["memory"])
    except (ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{folder / FILE} is of other nets or optimizers; delete it, or begin again with --overwrite."
        ) from error
    course.step, course.kept, course.seconds = body["step"], body["kept"], body["seconds"]
    course.loss = body["loss"]
    course.history, course.parts = json.loads(body["history"]), json.loads(body["parts"])
    course.counted = course.tally.forwards, course.tally.backwards = body["forwards"], body["backwards"]
