"""Workers that are processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, CancelledError, Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch

from robustkit.core.devices import ComputeDevice
from robustkit.distributed.new_process import begin
from robustkit.distributed.pool import Handle, Pickled, State, Task, WorkerDied, WorkerPool, run_task

T = TypeVar("T")
# Seconds that the exit code of a process that has ended may take to arrive.
MAX_EXIT_SECONDS = 2.0
# The state of the worker that this process is.
_STATE: State = {}


@dataclass(frozen=True)
class _Worker:
    """A process and the executor that sends it tasks. One executor each: a death breaks all of an executor."""

    number: int
    executor: ProcessPoolExecutor
    process: BaseProcess


class ProcessPool(WorkerPool):
    """Worker processes of this machine, each a fresh interpreter with its share of the driver's threads."""

    shares_files = True

    def __init__(self, count: int) -> None:
        """Start `count` processes; they import while the driver goes on."""
        self.count, self.threads = count, max(1, torch.get_num_threads() // count)
        self._workers = [self._start(number) for number in range(count)]
        self._owners: WeakKeyDictionary[Future[Any], _Worker] = WeakKeyDictionary()

    def _start(self, number: int) -> _Worker:
        executor = ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), initializer=begin, initargs=(self.threads,)
        )
        others = set(multiprocessing.active_children())
        with _interrupts_ignored():
            executor.submit(os.getpid)  # the process starts with the first task
        (process,) = set(multiprocessing.active_children()) - others
        return _Worker(number, executor, process)

    def device(self, own: torch.device, worker: int) -> str:
        """Return the driver's device, or one GPU after the other if it names no single one."""
        alone = ComputeDevice(own).is_cpu or own.index is not None
        return str(own) if alone else f"{own.type}:{worker % ComputeDevice(own).count}"

    def processes_per_device(self, own: torch.device) -> int:  # noqa: D102
        return self.count if own.index is not None else -(-self.count // ComputeDevice(own).count)

    def share(self, value: T, name: str) -> Handle[T]:  # noqa: D102
        return Pickled.of(value, name)

    def submit(self, worker: int, task: Task[T]) -> Future[Any]:  # noqa: D102
        pickled, owner = Pickled.of(task, "a task"), self._workers[worker]
        try:
            future: Future[Any] = owner.executor.submit(_run, pickled)
        except BrokenExecutor as error:
            future = Future()
            future.set_exception(error)
        self._owners[future] = owner
        return future

    def result(self, future: Future[Any]) -> Any:  # noqa: D102
        try:
            return future.result().get()
        except (BrokenExecutor, CancelledError) as error:
            owner = self._owners[future]
            owner.process.join(MAX_EXIT_SECONDS)
            code = owner.process.exitcode
            how = f"signal {-code}" if code and code < 0 else f"exit code {code}"
            raise WorkerDied(owner.number, how) from error

    def restart(self, worker: int) -> None:  # noqa: D102
        _end(self._workers[worker])
        self._workers[worker] = self._start(worker)

    def close(self) -> None:  # noqa: D102
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            _end(worker)


def _end(worker: _Worker) -> None:
    worker.process.kill()
    worker.executor.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Have processes that are started inside ignore Ctrl-C from their first moment; the driver handles it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _run(task: Pickled[Task[T]]) -> Pickled[T]:
    return Pickled.of(run_task(task.get(), _STATE), "a result")
