"""A pool of workers, each with a state of its own that is kept from task to task.

There are two: processes of this machine (`processes.ProcessPool`) and actors of a Ray cluster
(`ray_actors.RayPool`). Neither knows what the tasks do.
"""

from __future__ import annotations

import concurrent.futures
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, cast

import torch

from robustkit.core.errors import RobustkitError, RunError, UsageError, error_summary

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

# Values that a worker keeps between tasks, by name.
State = dict[str, Any]
# Called in the worker with that worker's state. It must be picklable: a function, or an object with __call__.
Task = Callable[[State], T]


class WorkerDied(Exception):
    """A worker ended before its task did.

    Args:
        worker: its number.
        how: for example "signal 9".
    """

    def __init__(self, worker: int, how: str) -> None:
        """Keep both."""
        super().__init__(worker, how)
        self.worker, self.how = worker, how


class Handle(Protocol[T_co]):
    """A value that was prepared once for all workers; part of a task."""

    def get(self) -> T_co:
        """Return the value, which the caller may change. Raise UsageError if it cannot be loaded here."""


class WorkerPool(ABC):
    """Runs tasks on workers with the numbers 0 to `count` - 1, each with `threads` CPU threads.

    A worker runs its tasks one after the other, in the order in which they were submitted. If it dies, all its
    futures raise `WorkerDied` and so do those submitted later, until it is restarted; other workers go on.

    Attributes:
        count: how many workers there are.
        threads: how many CPU threads each has.
        shares_files: whether all workers can read the files that the driver reads.
    """

    count: int
    threads: int
    shares_files: bool

    @abstractmethod
    def device(self, own: torch.device, worker: int) -> str:
        """Return the device on which a worker computes, where the driver computes on `own`."""

    def processes_per_device(self, own: torch.device) -> int:
        """Return how many workers compute on the same device, where the driver computes on `own`."""
        return 1

    @abstractmethod
    def share(self, value: T, name: str) -> Handle[T]:
        """Return a handle of a large value for the tasks of all workers, so that it is prepared once.

        Args:
            value: anything that can be pickled.
            name: what it is, for the message, for example "the model".

        Raises:
            UsageError: the value cannot be pickled.
        """

    @abstractmethod
    def submit(self, worker: int, task: Task[T]) -> Future[Any]:
        """Have a worker run a task after those that it already has.

        Raises:
            UsageError: the task cannot be pickled.
        """

    def wait(self, futures: Collection[Future[Any]], timeout: float | None = None) -> set[Future[Any]]:
        """Return those of `futures` that are done, as soon as there is one, or after `timeout` seconds."""
        return concurrent.futures.wait(futures, timeout, concurrent.futures.FIRST_COMPLETED).done

    @abstractmethod
    def result(self, future: Future[Any]) -> Any:
        """Return what a task returned, after waiting for it.

        Raises:
            RobustkitError: what the task raised; of another error it has type and message.
            WorkerDied: the worker ended before the task did.
        """

    @abstractmethod
    def restart(self, worker: int) -> None:
        """Replace a worker, dead or alive, by a new one under the same number with an empty state."""

    @abstractmethod
    def close(self) -> None:
        """End all workers, also those that are running a task."""


def open_pool(workers: int | None, ray: str | None) -> WorkerPool:
    """Return a pool whose workers are being started.

    Args:
        workers: how many; None for one process, or on Ray for one for each GPU, or CPU if it has no GPU.
        ray: address of a Ray cluster, "local" for a new one on this machine; None for processes without Ray.

    Raises:
        UsageError: Ray is not installed, or there is no cluster at this address.
    """
    if ray is None:
        from robustkit.distributed.processes import ProcessPool

        return ProcessPool(workers or 1)
    from robustkit.distributed.ray_actors import RayPool

    return RayPool(ray, workers)


def run_task(task: Task[T], state: State) -> T:
    """Return what a task returns; called in the worker.

    Raises:
        RobustkitError: what the task raised, with any other error as a RunError that has its type and message.
            Errors of other packages may fail to unpickle in the driver.
    """
    try:
        return task(state)
    except RobustkitError:
        raise
    # Ctrl-C reaches the driver only: a KeyboardInterrupt here is raised by the code of a model or plug-in.
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        raise RunError(f"a worker failed with {error_summary(error)}.") from error


@dataclass(frozen=True)
class Pickled(Generic[T]):
    """A value as bytes; the handle for workers that have no object store.

    The pools of `concurrent.futures` would pickle by multiprocessing's own pickler, to which torch adds that
    tensors are shared through a listening socket of their process, and lost with it.
    """

    content: bytes
    name: str

    @classmethod
    def of(cls, value: T, name: str) -> Pickled[T]:
        """Return a value pickled; UsageError with its `name` if that fails."""
        try:
            return cls(pickle.dumps(value, pickle.HIGHEST_PROTOCOL), name)
        except Exception as error:
            raise cannot_send(name, error) from error

    def get(self) -> T:
        """Return a new copy of the value."""
        try:
            return cast("T", pickle.loads(self.content))  # bytes of the run's own driver or worker
        except Exception as error:
            raise cannot_load(self.name, error) from error


def cannot_send(name: str, error: Exception) -> UsageError:
    """Return the error for a value that cannot be pickled."""
    return UsageError(
        f"{name} cannot be sent to workers ({error_summary(error)}); "
        "define its classes and functions at the top of a module, or leave --workers out."
    )


def cannot_load(name: str, error: Exception) -> UsageError:
    """Return the error for a value that a worker cannot unpickle."""
    return UsageError(
        f"a worker cannot load {name} ({error_summary(error)}); "
        "define it in a module that can be imported, or leave --workers out."
    )
