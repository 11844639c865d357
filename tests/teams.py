"""Workers for tests: threads of this process in the place of processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
import torch

from robustkit.distributed import sent_models, sharing
from robustkit.distributed.pool import Handle, Pickled, State, Task, WorkerDied, WorkerPool, run_task
from robustkit.engine.evaluation import search_scheduler
from robustkit.engine.evaluation.block_runner import BlockRunner
from robustkit.engine.progress import Progress
from robustkit.models import load_model

T = TypeVar("T")


class Died(BaseException):
    """Raised by a task in a `ThreadPool`, its worker dies."""


@dataclass(eq=False)
class _Thread:
    """A worker that is a thread."""

    number: int
    executor: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "worker"))
    state: State = field(default_factory=dict)
    died: str = ""

    def run(self, task: Pickled[Any], turn: AbstractContextManager[object]) -> Pickled[Any]:
        """Return a task's result, both copied by pickle as between processes."""
        with turn:
            if not self.died:
                try:
                    return Pickled.of(run_task(task.get(), self.state), "a result")
                except Died:
                    self.died = "raised Died"
            raise WorkerDied(self.number, self.died)

    def end(self, *, wait: bool) -> None:
        """End the thread after its tasks; an unfinished search ends as it does with a process."""
        with suppress(RuntimeError):  # it was ended before
            self.executor.submit(self._end_search)
        self.executor.shutdown(wait=wait)

    def _end_search(self) -> None:
        if unfinished := self.state.get("worker"):
            unfinished.close()


class ThreadPool(WorkerPool):
    """Workers of this process, which start at once; processes take seconds to import torch.

    One task runs at a time: code that seeds the global generators shares them with other threads.
    """

    threads = 1
    shares_files = True
    turn = threading.RLock()

    def __init__(self, count: int) -> None:
        self.count = count
        self._workers = [_Thread(number) for number in range(count)]

    def device(self, own: torch.device, worker: int) -> str:
        return str(own)

    def share(self, value: T, name: str) -> Handle[T]:
        return Pickled.of(value, name)

    def submit(self, worker: int, task: Task[T]) -> Future[Any]:
        owner = self._workers[worker]
        return owner.executor.submit(owner.run, Pickled.of(task, "a task"), self.turn)

    def result(self, future: Future[Any]) -> Any:
        return future.result().get()

    def kill(self, worker: int) -> None:
        """Have a worker die; the task that it is running goes on to its end."""
        self._workers[worker].died = "killed"

    def restart(self, worker: int) -> None:
        self._workers[worker].died = "restarted"
        self._workers[worker].end(wait=False)
        self._workers[worker] = _Thread(worker)

    def close(self) -> None:
        for worker in self._workers:
            worker.died = "closed"
            worker.end(wait=True)


def as_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have workers as threads, which are quick to split and to look."""

    def in_turn(work: Callable[..., Any]) -> Callable[..., Any]:
        def locked(*arguments: object, **named: object) -> Any:
            with ThreadPool.turn:
                return work(*arguments, **named)

        return locked

    # The driver shares the global generators with workers that are threads, as it does not with processes.
    monkeypatch.setattr(BlockRunner, "prepare", in_turn(BlockRunner.prepare))
    monkeypatch.setattr(sent_models, "load_model", in_turn(load_model))
    monkeypatch.setattr(sharing, "open_pool", lambda workers, ray: ThreadPool(workers))
    monkeypatch.setattr(search_scheduler, "SPLIT_EVERY", 0.0)
    monkeypatch.setattr(search_scheduler, "STEP_SECONDS", 0.01)
    monkeypatch.setattr(search_scheduler, "WORTH_SPLITTING", 2)
    monkeypatch.setattr(sharing, "MAX_WAIT", 0.05)


def in_worker() -> bool:
    """Return whether this code runs in a worker."""
    return threading.current_thread().name.startswith("worker")


class Watch(Progress):
    """Keeps what is said; may stop the run after some news of progress, as Ctrl-C would."""

    def __init__(self, after: int = -1) -> None:
        self.said: list[str] = []
        self.left = after

    def say(self, text: str) -> None:
        self.said.append(text)

    def advance(self, done: float, robust: int) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
