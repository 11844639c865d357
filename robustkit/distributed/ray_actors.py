"""Workers that are actors of a Ray cluster, which places and starts them and carries tasks and results."""

from __future__ import annotations

import copy
import socket
import sys
import threading
from collections.abc import Collection, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any, Generic, TextIO, TypeVar
from weakref import WeakKeyDictionary

import torch

from robustkit.core.errors import RobustkitError, UsageError, error_summary
from robustkit.distributed.pool import (
    Handle,
    State,
    Task,
    WorkerDied,
    WorkerPool,
    cannot_load,
    cannot_send,
    run_task,
)

T = TypeVar("T")
LOCAL = "local"
# Seconds for the first sign of a cluster; ray.init itself ends the process after two minutes without one.
MAX_CONNECT_SECONDS = 10.0


class RayPool(WorkerPool):
    """Actors of a Ray cluster with a GPU each where the cluster has any, otherwise with `threads` CPUs each."""

    def __init__(self, address: str, count: int | None = None) -> None:
        """Connect to a cluster and start the actors, which wait until there is room for them.

        Args:
            address: "auto", "HOST:PORT", "ray://HOST:PORT", or "local" for a new cluster on this machine.
            count: how many; None for as many as the cluster has GPUs, or CPUs if it has no GPU.

        Raises:
            UsageError: Ray is not installed, or there is no cluster at this address, or it refuses the token.
        """
        try:
            import ray
        except ImportError:
            raise UsageError("there is no Ray here: pip install ray, or leave --ray out.") from None
        self.ray, self.shares_files = ray, address == LOCAL
        self._connection = ExitStack()
        if not ray.is_initialized():
            self._connection.enter_context(_connected(ray, address))
        total = ray.cluster_resources()
        self.gpus = int(total.get("GPU", 0))
        smallest = min(int(node["Resources"].get("CPU", 0)) or 1 for node in ray.nodes() if node["Alive"])
        self.count = count or self.gpus or int(total.get("CPU", 1))
        self.threads = max(1, min(int(total.get("CPU", 1)) // self.count, smallest))
        self._actors = [self._start() for _ in range(self.count)]
        self._owners: WeakKeyDictionary[Future[Any], int] = WeakKeyDictionary()

    def _start(self) -> Any:
        needs: dict[str, Any] = {"num_gpus": 1} if self.gpus else {"num_cpus": self.threads}
        actor = self.ray.remote(_Actor).options(**needs, max_restarts=0, scheduling_strategy="SPREAD")
        return actor.remote(self.threads)

    def device(self, own: torch.device, worker: int) -> str:
        """Return where it computes: Ray shows each actor one GPU."""
        return "cuda" if self.gpus else "cpu"

    def share(self, value: T, name: str) -> Handle[T]:  # noqa: D102
        try:
            return _Stored(self.ray.put(value), name)
        except TypeError as error:
            raise cannot_send(name, error) from error

    def submit(self, worker: int, task: Task[T]) -> Future[Any]:  # noqa: D102
        try:
            future: Future[Any] = self._actors[worker].run.remote(task).future()
        except TypeError as error:
            raise cannot_send("a task", error) from error
        self._owners[future] = worker
        return future

    def result(self, future: Future[Any]) -> Any:  # noqa: D102
        try:
            return future.result()
        except self.ray.exceptions.RayTaskError as error:
            # Any other error than of `run_task` comes from unpickling the task.
            known = isinstance(error.cause, RobustkitError)
            raise (error.cause if known else cannot_load("a task", error.cause)) from error
        except self.ray.exceptions.RayError as error:
            how = "its node has died" if "its node has died" in str(error) else type(error).__name__
            raise WorkerDied(self._owners[future], how) from error

    def restart(self, worker: int) -> None:  # noqa: D102
        self.ray.kill(self._actors[worker])
        self._actors[worker] = self._start()

    def close(self) -> None:
        """End all actors, and the connection if it was opened here."""
        while self._actors:
            self.ray.kill(self._actors.pop())
        self._connection.close()


@contextmanager
def _connected(ray: Any, address: str) -> Iterator[None]:
    """Connect to a cluster inside; what Ray prints is left out, because stdout is for results."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    others, hint = threading.enumerate(), "start one with ray start --head, or write --ray local."
    try:
        if host and port.isdigit():
            socket.create_connection((host.strip("[]"), int(port)), MAX_CONNECT_SECONDS).close()
            hint = "if it requires a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to a file with it."
        ray.init(address, include_dashboard=False, log_to_driver=False, logging_level="warning")
    except (OSError, RuntimeError, ValueError, SystemExit, ray.exceptions.RayError) as error:
        raise UsageError(f"no Ray cluster at {address!r} ({error_summary(error)}); {hint}") from error
    ray_threads = set(threading.enumerate()).difference(others)
    try:
        with redirect_stdout(_Stdout(sys.stdout, ray_threads)):
            yield
    finally:
        ray.shutdown()


@dataclass(frozen=True)
class _Stdout:
    """stdout without what Ray's threads print: pages about each worker that died, whatever `log_to_driver` is."""

    stdout: TextIO
    ray_threads: Collection[threading.Thread]

    def write(self, text: str) -> int:
        """Write a text."""
        return len(text) if threading.current_thread() in self.ray_threads else self.stdout.write(text)

    def __getattr__(self, name: str) -> Any:
        """Return any other attribute of stdout."""
        return getattr(self.stdout, name)


@dataclass(frozen=True)
class _Stored(Generic[T]):
    """A value in the cluster's object store; the handle for actors."""

    reference: Any
    name: str

    def get(self) -> T:
        """Return a copy of the value: arrays of the store cannot be written to."""
        import ray

        try:
            value: T = ray.get(self.reference)
        except ray.exceptions.RayError as error:
            raise cannot_load(self.name, error) from error
        return copy.deepcopy(value)

    def __deepcopy__(self, memo: object) -> _Stored[T]:
        """Return the handle itself: its value is copied when it is used."""
        return self


class _Actor:
    """A worker: a process of the cluster."""

    def __init__(self, thread_count: int) -> None:
        """Begin with an empty state."""
        torch.set_num_threads(thread_count)
        self.state: State = {}

    def run(self, task: Task[T]) -> T:
        """Run a copy of the task: arrays that came through the object store cannot be written to."""
        return run_task(copy.deepcopy(task), self.state)
