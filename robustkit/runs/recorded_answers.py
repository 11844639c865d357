"""Record the answers of models to a piece of work, so that a killed run need not compute them again.

The result of an attack is a function of the images, its random numbers and the model's answers. Its state is held
in the variables of its code, which may be another package's, and cannot be saved; but with the same answers the
same code reaches the same state. So logits and gradients are recorded, with the state of the random generators
after each. When the work is started again it gets them in order, each checked against its query, and calls the
model only after the last one.
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

from robustkit.core.isolation import generators, set_generators
from robustkit.runs.unfinished_work import Record, Store, decoded, encoded

T = TypeVar("T")
Net = Callable[[Tensor], Tensor]
# An input and the answer to it, connected in autograd.
Graph = tuple[Tensor, Tensor]

# Seconds between two writes, and bytes that may wait for one.
WRITE_EVERY, MOST_WAITING = 2.0, 256 << 20
# Recording is given up if it takes more than this share of the models' own time over so many answers: such work is
# dominated by the attack's own arithmetic, which following the records would repeat as well.
WORTH, TRIED = 0.1, 32


class Answers:
    """The record of one piece of work of a store."""

    def __init__(self, store: Store, name: str) -> None:
        """Take what was recorded before."""
        self.store, self.name = store, name
        self.known = deque(store.read(name))
        self.used: list[bytes] = []
        self.begin: tuple[bytes, ...] = ()
        self.waiting: list[bytes] = []
        self.children = 0
        self.bytes, self.room = sum(map(len, self.known)), store.room()
        self.written = self.started = time.perf_counter()
        self.before = 0.0
        self.count, self.cost, self.work = 0, 0.0, 0.0
        self.off = not store.keeps
        self._generators = generators()

    @property
    def seconds(self) -> float:
        """How long the work has taken, that of sessions before included as far as it was recorded."""
        return time.perf_counter() - self.started + self.before

    @property
    def rows(self) -> int | None:
        """How many rows the next recorded answer has; None if there is none."""
        record = self._next()
        return int(record["rows"]) if record and record["kind"] == "forward" else None

    def first(self) -> Record | None:
        """Take the state that the work was begun from, where there is one."""
        record = self._next()
        if record is None or record["kind"] != "begin":
            return None
        self.begin = (self.known[0],)
        self._take("begin", 0)
        state: Record = record["state"]
        return state

    def restart(self, state: Record | None = None, *, on: bool = True) -> None:
        """Forget all answers: the work goes on from this state, or begins anew; `on` is whether to record more."""
        self.off = not (on and self.store.keeps)
        self.children = 0
        self.begin = () if state is None else (encoded(self._record("begin", 0, {"state": state})),)
        self._forget()

    def _forget(self) -> None:
        """Forget all answers on disk."""
        self.known.clear()
        self.waiting.clear()
        self.bytes = sum(map(len, self.begin))
        self.store.replace(self.name, *self.begin)
        for child in self.store.names(f"{self.name}."):
            self.store.replace(child)
        self.written = time.perf_counter()

    def ask(self, net: Net, x: Tensor, *, differentiable: bool, keep: bool) -> Tensor:
        """Return a net's answer to x, known or new; `keep` is whether its graph may stay in memory."""
        if self.off:
            return net(x)
        query = _checksum(x)
        before = generators() if differentiable and (self.known or not keep) else None
        record = self._take("forward", query)
        graph: Graph | None = None
        if record is None:
            out, attached, graph = self._answer(net, x, differentiable)
            self._put("forward", query, {"out": out.detach(), "attached": attached, "rows": len(x)})
        else:
            out, attached = record["out"].to(x.device), bool(record["attached"])
        if not (differentiable and attached):
            return out.detach()

        def back(gradient: Tensor) -> Tensor:
            nonlocal graph
            query = _checksum(gradient)
            record = self._take("backward", query)
            if record is not None:
                known: Tensor = record["out"].to(x.device)
                return known
            leaf, answer = graph or self._again(net, x, before)
            graph = (leaf, answer) if keep else None
            begun = time.perf_counter()
            (found,) = torch.autograd.grad(answer, leaf, gradient, retain_graph=keep, allow_unused=True)
            slope = torch.zeros_like(leaf) if found is None else found
            self.work += time.perf_counter() - begun
            self._put("backward", query, {"out": slope})
            return slope

        told: Tensor = _Told.apply(x, out.detach(), back)
        return told

    def once(self, name: str, work: Callable[[], T]) -> T:
        """Return the result of a part of the work, recorded or new; the answers inside it are then dropped."""
        if self.off:
            return work()
        label = zlib.crc32(name.encode())
        self.children += 1
        inner = f"{self.name}.{self.children}"
        record = self._take("once", label)
        if record is not None:
            value: T = record["out"]
            return value
        with recording(self.store, inner) as answers:
            value = work()
        self.cost, self.work = self.cost + answers.cost, self.work + answers.work
        self._put("once", label, {"out": value})
        if answers.bytes or answers.seconds > 1:
            self.write()
        answers.restart()
        return value

    def write(self) -> None:
        """Write down what waits."""
        if self.waiting and not self.off:
            self.store.append(self.name, *self.waiting)
        self.waiting = []
        self.written = time.perf_counter()

    def _answer(self, net: Net, x: Tensor, differentiable: bool) -> tuple[Tensor, bool, Graph | None]:
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

    def _again(self, net: Net, x: Tensor, before: Record | None) -> tuple[Tensor, Tensor]:
        """Answer again with the generators as they were, for a gradient whose graph is gone."""
        now = generators()
        if before is not None:
            set_generators(before)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            answer = net(leaf)
        set_generators(now)
        return leaf, answer

    def _record(self, kind: str, label: int, more: Record) -> Record:
        now = generators()
        moved = any(not torch.equal(now[name], self._generators.get(name, now[name][:0])) for name in now)
        self._generators = now
        return {
            "kind": kind,
            "label": label,
            "seconds": self.seconds,
            "generators": now if moved or kind == "begin" else None,
            **more,
        }

    def _next(self) -> dict[str, Any] | None:
        return decoded(self.known[0]) if self.known else None

    def _take(self, kind: str, label: int) -> dict[str, Any] | None:
        """Take the next record if it is of this query; else forget it and all that follow."""
        if not self.known:
            return None
        try:
            record = self._next()
            fits = record is not None and (record["kind"], record["label"]) == (kind, label)
        except Exception:  # whatever a record of another version or a strange file may raise
            record, fits = None, False
        if record is None or not fits:
            self.known.clear()
            self.store.replace(self.name, *self.used)
            self.used = []
            return None
        self.used.append(self.known.popleft())
        if not self.known:
            self.used = []
        self.before = max(self.before, record["seconds"] - (time.perf_counter() - self.started))
        if record["generators"] is not None:
            set_generators(record["generators"])
            self._generators = record["generators"]
        return record

    def _put(self, kind: str, label: int, more: Record) -> None:
        if self.off:
            return
        begun = time.perf_counter()
        body = encoded(self._record(kind, label, more))
        self.waiting.append(body)
        self.bytes += len(body)
        late = begun - self.written > WRITE_EVERY
        if late or sum(map(len, self.waiting)) > MOST_WAITING:
            self.write()
        self.count += 1
        self.cost += time.perf_counter() - begun
        if self.bytes > self.room or (self.count > TRIED and self.cost > WORTH * self.work):
            self._forget()
            self.off = True


class _Told(torch.autograd.Function):
    """An answer whose gradient is told by a function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out: Tensor, back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.back = back
        return out.view_as(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        slope: Tensor = ctx.back(gradient)
        return slope, None, None


_CURRENT: ContextVar[Answers | None] = ContextVar("answers", default=None)


def current() -> Answers | None:
    """Return the record of the work that is being done, if it is recorded."""
    return _CURRENT.get()


@contextmanager
def recording(store: Store, name: str) -> Iterator[Answers]:
    """Record the answers to the work inside under this name, and give those that are recorded."""
    answers = Answers(store, name)
    token = _CURRENT.set(answers)
    try:
        yield answers
    finally:
        _CURRENT.reset(token)


@contextmanager
def live() -> Iterator[None]:
    """Ask models themselves inside: for what looks at their parts while they answer."""
    token = _CURRENT.set(None)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def asked(net: Net, x: Tensor) -> Tensor:
    """Return a net's answer to x, from the record where there is one."""
    answers = current()
    if answers is None:
        return net(x)
    return answers.ask(net, x, differentiable=torch.is_grad_enabled() and x.requires_grad, keep=True)


def once(name: str, work: Callable[[], T]) -> T:
    """Return what a part of the recorded work comes to, which is done once however often it is begun."""
    answers = current()
    return work() if answers is None else answers.once(name, work)


def _checksum(x: Tensor) -> int:
    return zlib.crc32(x.detach().cpu().contiguous().view(torch.uint8).numpy().data)
