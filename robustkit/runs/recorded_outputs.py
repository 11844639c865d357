"""Record the outputs of models during a task, so that a killed run does not compute them again.

The result of an attack is a function of the images, its random numbers and the model's outputs. Its state is held
in the variables of its code, which may belong to another package, and cannot be saved; but with the same outputs
the same code reaches the same state. So logits and gradients are recorded, with the state of the random generators
after each. When the task is started again it gets them in order, each checked against the input that it was
recorded for, and calls the model only after the last one.
"""

from __future__ import annotations

import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor

from robustkit.core.gradients import vector_jacobian
from robustkit.core.isolation import generators, set_generators
from robustkit.runs.unfinished_work import Record, Store, decoded, encoded

T = TypeVar("T")
Net = Callable[[Tensor], Tensor]
# An input and its output, connected in autograd.
Graph = tuple[Tensor, Tensor]

# Seconds between two writes to disk, and the most bytes that wait for one.
WRITE_EVERY, MAX_UNWRITTEN_BYTES = 2.0, 256 << 20
# Recording is disabled if, after so many calls, it takes more than this share of the models' own time: such a task
# spends its time in the attack's own arithmetic, which would be repeated anyway.
MAX_COST_SHARE, MIN_CALLS = 0.1, 32


class OutputRecord:
    """The outputs of models during one task of a store."""

    def __init__(self, store: Store, name: str) -> None:
        """Read what was recorded before."""
        self.store, self.name = store, name
        self.recorded = deque(store.read(name))
        self.used: list[bytes] = []
        self.first_record: tuple[bytes, ...] = ()
        self.unwritten: list[bytes] = []
        self.parts = 0
        self.bytes, self.capacity = sum(map(len, self.recorded)), store.capacity()
        self.written = self.started = time.perf_counter()
        self.before = 0.0
        self.count, self.cost, self.work = 0, 0.0, 0.0
        self.disabled = not store.keeps
        self._generators = generators()

    @property
    def seconds(self) -> float:
        """Seconds that the task has taken, those of killed runs included as far as they were recorded."""
        return time.perf_counter() - self.started + self.before

    @property
    def rows(self) -> int | None:
        """How many rows the next recorded output has; None if there is none."""
        record = self._next()
        return int(record["rows"]) if record and record["kind"] == "forward" else None

    def first(self) -> Record | None:
        """Return the state that the task started from; None if it has none."""
        record = self._next()
        if record is None or record["kind"] != "begin":
            return None
        self.first_record = (self.recorded[0],)
        self._take("begin", 0)
        state: Record = record["state"]
        return state

    def restart(self, state: Record | None = None, *, on: bool = True) -> None:
        """Delete all outputs and continue from this state, or start again; `on` is whether to record more."""
        self.disabled = not (on and self.store.keeps)
        self.parts = 0
        self.first_record = () if state is None else (encoded(self._record("begin", 0, {"state": state})),)
        self._delete()

    def _delete(self) -> None:
        """Delete all outputs on disk."""
        self.recorded.clear()
        self.unwritten.clear()
        self.bytes = sum(map(len, self.first_record))
        self.store.replace(self.name, *self.first_record)
        for part in self.store.names(f"{self.name}."):
            self.store.replace(part)
        self.written = time.perf_counter()

    def call(self, net: Net, x: Tensor, *, differentiable: bool, keep: bool) -> Tensor:
        """Return a net's output for x, recorded or new; `keep` is whether its graph may stay in memory."""
        if self.disabled:
            return net(x)
        checksum = _checksum(x)
        before = generators() if differentiable and (self.recorded or not keep) else None
        record = self._take("forward", checksum)
        graph: Graph | None = None
        if record is None:
            out, attached, graph = self._run(net, x, differentiable)
            self._put("forward", checksum, {"out": out.detach(), "attached": attached, "rows": len(x)})
        else:
            out, attached = record["out"].to(x.device), bool(record["attached"])
        if not (differentiable and attached):
            return out.detach()

        def back(gradient: Tensor) -> Tensor:
            nonlocal graph
            checksum = _checksum(gradient)
            record = self._take("backward", checksum)
            if record is not None:
                known: Tensor = record["out"].to(x.device)
                return known
            leaf, output = graph or self._repeat(net, x, before)
            graph = (leaf, output) if keep else None
            begun = time.perf_counter()
            result = vector_jacobian(output, leaf, gradient, retain_graph=keep)
            self.work += time.perf_counter() - begun
            self._put("backward", checksum, {"out": result})
            return result

        linked: Tensor = _GivenGradient.apply(x, out.detach(), back)
        return linked

    def run_once(self, name: str, work: Callable[[], T]) -> T:
        """Return the result of a part of the task, recorded or new; the outputs inside it are then deleted."""
        if self.disabled:
            return work()
        label = zlib.crc32(name.encode())
        self.parts += 1
        inner = f"{self.name}.{self.parts}"
        record = self._take("once", label)
        if record is not None:
            value: T = record["out"]
            return value
        with recording(self.store, inner) as part:
            value = work()
        self.cost, self.work = self.cost + part.cost, self.work + part.work
        self._put("once", label, {"out": value})
        if part.bytes or part.seconds > 1:
            self.write()
        part.restart()
        return value

    def write(self) -> None:
        """Write to disk what is not yet there."""
        if self.unwritten and not self.disabled:
            self.store.append(self.name, *self.unwritten)
        self.unwritten = []
        self.written = time.perf_counter()

    def _run(self, net: Net, x: Tensor, differentiable: bool) -> tuple[Tensor, bool, Graph | None]:
        begun = time.perf_counter()
        if not differentiable:
            out = net(x)
            graph = None
        else:
            leaf = x.detach().requires_grad_()
            out = net(leaf)
            graph = (leaf, out) if out.requires_grad else None
        self.work += time.perf_counter() - begun
        return out, graph is not None, graph

    def _repeat(self, net: Net, x: Tensor, before: Record | None) -> tuple[Tensor, Tensor]:
        """Repeat a pass with the generators as they were, for a gradient whose graph was not kept."""
        now = generators()
        if before is not None:
            set_generators(before)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            output = net(leaf)
        set_generators(now)
        return leaf, output

    def _record(self, kind: str, label: int, more: Record) -> Record:
        now = generators()
        changed = any(not torch.equal(now[name], self._generators.get(name, now[name][:0])) for name in now)
        self._generators = now
        return {
            "kind": kind,
            "label": label,
            "seconds": self.seconds,
            "generators": now if changed or kind == "begin" else None,
            **more,
        }

    def _next(self) -> dict[str, Any] | None:
        return decoded(self.recorded[0]) if self.recorded else None

    def _take(self, kind: str, label: int) -> dict[str, Any] | None:
        """Take the next record if it is of this input; else delete it and all that follow."""
        if not self.recorded:
            return None
        try:
            record = self._next()
            matches = record is not None and (record["kind"], record["label"]) == (kind, label)
        except Exception:  # any error of a record of another version or of a foreign file
            record, matches = None, False
        if record is None or not matches:
            self.recorded.clear()
            self.store.replace(self.name, *self.used)
            self.used = []
            return None
        self.used.append(self.recorded.popleft())
        if not self.recorded:
            self.used = []
        self.before = max(self.before, record["seconds"] - (time.perf_counter() - self.started))
        if record["generators"] is not None:
            set_generators(record["generators"])
            self._generators = record["generators"]
        return record

    def _put(self, kind: str, label: int, more: Record) -> None:
        if self.disabled:
            return
        begun = time.perf_counter()
        body = encoded(self._record(kind, label, more))
        self.unwritten.append(body)
        self.bytes += len(body)
        overdue = begun - self.written > WRITE_EVERY
        if overdue or sum(map(len, self.unwritten)) > MAX_UNWRITTEN_BYTES:
            self.write()
        self.count += 1
        self.cost += time.perf_counter() - begun
        if self.bytes > self.capacity or (self.count > MIN_CALLS and self.cost > MAX_COST_SHARE * self.work):
            self._delete()
            self.disabled = True


class _GivenGradient(torch.autograd.Function):
    """An output whose gradient a function returns."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out: Tensor, back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.back = back
        return out.view_as(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        result: Tensor = ctx.back(gradient)
        return result, None, None


# The record of the task that is running now.
ACTIVE: ContextVar[OutputRecord | None] = ContextVar("output_record", default=None)


@contextmanager
def recording(store: Store, name: str) -> Iterator[OutputRecord]:
    """Record model outputs inside under this name, and return those that are recorded."""
    record = OutputRecord(store, name)
    token = ACTIVE.set(record)
    try:
        yield record
    finally:
        ACTIVE.reset(token)


@contextmanager
def not_recording() -> Iterator[None]:
    """Call the models themselves inside: for code that observes their parts during a pass."""
    token = ACTIVE.set(None)
    try:
        yield
    finally:
        ACTIVE.reset(token)


def recorded_call(net: Net, x: Tensor) -> Tensor:
    """Return a net's output for x, from the record where there is one."""
    record = ACTIVE.get()
    if record is None:
        return net(x)
    return record.call(net, x, differentiable=torch.is_grad_enabled() and x.requires_grad, keep=True)


def run_once(name: str, work: Callable[[], T]) -> T:
    """Return the result of a part of the recorded task, which is computed once however often the run restarts."""
    record = ACTIVE.get()
    return work() if record is None else record.run_once(name, work)


def _checksum(x: Tensor) -> int:
    return zlib.crc32(x.detach().cpu().contiguous().view(torch.uint8).numpy().data)
