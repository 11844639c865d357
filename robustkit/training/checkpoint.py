"""The checkpoint of an unfinished run: one file that is replaced atomically; the previous file is kept.

A checkpoint contains the SHA-256 of its content; a run never resumes from one that has changed.
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
from robustkit.training.memory import PerturbationMemory
from robustkit.training.method import Method, Plan
from robustkit.training.nets import PassCounts
from robustkit.training.posterior_method import kept_steps

FILE, PREVIOUS = CHECKPOINTS


@dataclass
class TrainState:
    """The progress of a run.

    Args:
        loss: sum of the losses of the current epoch, on the device; it is read once per epoch.
        step: steps done.
        kept: states kept for the posterior.
        seconds: training time over all sessions.
        history: metrics of each finished epoch.
        pass_counts: forward and backward passes of images.
        shared_counts: forward and backward passes that the processes have exchanged.
        versions: which versions of robustkit made which steps (`robustkit.runs.versions`).
    """

    loss: Tensor
    step: int = 0
    kept: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    pass_counts: PassCounts = field(default_factory=PassCounts)
    shared_counts: tuple[int, int] = (0, 0)
    versions: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class ModelState:
    """The nets and optimizers of a run, and its weight averages and perturbation memory if it has them."""

    nets: Sequence[nn.Module]
    optimizers: Sequence[torch.optim.Optimizer]
    averages: Sequence[dict[str, Tensor]]
    memory: PerturbationMemory | None = None

    def member_state(self, member: int) -> dict[str, Any]:
        """Return the state of one member: net, optimizer and average."""
        average = self.averages[member] if self.averages else {}
        return {
            "net": self.nets[member].state_dict(),
            "optimizer": self.optimizers[member].state_dict(),
            "average": average,
        }

    def load_member(self, member: int, state: Mapping[str, Any]) -> None:
        """Load the state of one member, in place."""
        self.nets[member].load_state_dict(state["net"])
        self.optimizers[member].load_state_dict(state["optimizer"])
        if self.averages:
            self.averages[member].update(state["average"])


def save(folder: Path, train_state: TrainState, model_state: ModelState) -> None:
    """Write a checkpoint; the previous one is kept in case this one gets damaged."""
    body = {
        "step": train_state.step,
        "kept": train_state.kept,
        "loss": train_state.loss.cpu(),
        "seconds": train_state.seconds,
        "history": json.dumps(train_state.history),
        "forwards": train_state.pass_counts.forwards,
        "backwards": train_state.pass_counts.backwards,
        "nets": [net.state_dict() for net in model_state.nets],
        "optimizers": [optimizer.state_dict() for optimizer in model_state.optimizers],
        "averages": list(model_state.averages),
        "memory": None if model_state.memory is None else model_state.memory.packed,
        "parts": json.dumps(train_state.versions),
    }
    body["sha256"] = digest(body)
    with replacing(folder / FILE, folder / PREVIOUS) as stream:
        torch.save(body, stream)


@dataclass(frozen=True)
class FoundCheckpoint:
    """The bytes of the newest valid checkpoint; `damaged` describes the fault of a newer one, if there is one."""

    content: bytes
    damaged: str = ""


def find_checkpoint(folder: Path, method: Method, plan: Plan) -> FoundCheckpoint | None:
    """Return the newest valid checkpoint, or None if there is no file. A damaged newer file is removed.

    Raises:
        UsageError: if there are files and all are damaged.
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
        return FoundCheckpoint(content, damaged)
    if damaged:
        raise UsageError(f"{damaged}; delete it to start again, or start again with --overwrite.")
    return None


def _fault(content: bytes, method: Method, plan: Plan) -> str:
    """Return what is wrong with the bytes of a checkpoint, an empty text if it is valid."""
    try:
        body = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if body.pop("sha256", None) != digest(body):
            return "its content does not match its sha256"
        step, kept, history = body["step"], body["kept"], json.loads(body["history"])
        if not (type(step) is int and 0 <= step <= plan.steps):
            return f"step is {step!r}, and must be from 0 to {plan.steps}"
        expected = {
            "kept": (kept, len(kept_steps(method, plan, step))),
            "epochs": (len(history), step // plan.steps_per_epoch),
        }
        for name, (found, right) in expected.items():
            if type(found) is not int or found != right:
                return f"{name} is {found!r}, and must be {right} at step {step}"
        for name in ("seconds", "forwards", "backwards"):
            if not 0 <= body[name] < math.inf:
                return f"{name} is {body[name]!r}, and must be a number from 0 up"
        if not math.isfinite(float(body["loss"])):
            return f"loss is {float(body['loss'])}, and must be finite"
    except Exception as error:  # the errors that a damaged file raises are not a closed list
        return f"it cannot be read ({type(error).__name__})"
    return ""


def load(content: bytes, folder: Path, train_state: TrainState, model_state: ModelState) -> None:
    """Load a valid checkpoint, in place.

    Raises:
        UsageError: if it does not fit the nets or optimizers.
    """
    body = torch.load(io.BytesIO(content), map_location=train_state.loss.device, weights_only=True)
    try:
        for net, state in zip(model_state.nets, body["nets"], strict=True):
            net.load_state_dict(state)
        for optimizer, state in zip(model_state.optimizers, body["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        for average, state in zip(model_state.averages, body["averages"], strict=True):
            average.update(state)
        if model_state.memory is not None:
            model_state.memory.packed.copy_(body["memory"])
    except (ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{folder / FILE} belongs to other nets or optimizers; delete it, or start again with --overwrite."
        ) from error
    train_state.step, train_state.kept, train_state.seconds = body["step"], body["kept"], body["seconds"]
    train_state.loss = body["loss"]
    train_state.history, train_state.versions = json.loads(body["history"]), json.loads(body["parts"])
    train_state.shared_counts = train_state.pass_counts.forwards, train_state.pass_counts.backwards = (
        body["forwards"],
        body["backwards"],
    )
