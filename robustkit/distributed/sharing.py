"""The workers of a pool, shared by the runs of a command: all are busy as long as any run has something to do.

A free worker goes to a run that has none yet, so that it loads a model once and keeps it; only when no run is
without a worker do several share one, by samples, as in a command with one run.
"""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from robustkit.core.errors import RobustkitError, RunError
from robustkit.core.isolation import threads
from robustkit.distributed.pool import Task, WorkerDied, WorkerPool, open_pool

T = TypeVar("T")
P = TypeVar("P")
# Workers that die one after the other without a verdict between them, before the run ends with an error.
MAX_DEATHS = 3
# The most seconds that a run waits for its workers before it looks at its time limit and for new workers.
MAX_WAIT = 0.5
# Tasks that each worker has at once, so that it never waits for the driver.
MAX_CALLS = 2


class Stopped(BaseException):
    """The command has ended: no error of a model or an attack, so nothing that catches those catches it."""


@dataclass(eq=False)
class Worker:
    """A worker with one run's model.

    Attributes:
        slot: its number in the pool.
        number: another number for each worker of a command, also for one in the place of a dead one.
        loaded: what its run's load task returned; None until then.
        calls: its tasks in flight, with what each is for.
        held: positions that it was given and has returned no verdict on.
    """

    slot: int
    number: int
    loaded: Any = None
    calls: dict[Future[Any], Any] = field(default_factory=dict)
    held: set[int] = field(default_factory=set)


class Team:
    """The workers of one run, which come and go.

    Attributes:
        pool: of all workers.
        members: the workers; those that are `loaded` can be given tasks.
        more: whether another worker would find something to do.
        deaths: in a row; set it to 0 on a verdict.
    """

    def __init__(self, shared: SharedPool, load: Callable[[Worker], Task[Any]]) -> None:
        """Begin without workers."""
        self.shared, self.pool, self.load = shared, shared.pool, load
        self.members: list[Worker] = []
        self.more = False
        self.deaths = 0

    @property
    def count(self) -> int:
        """How many workers share the run's queue: all of the pool, or those here if there are other runs."""
        return max(1, len(self.members)) if self.shared.several else self.pool.count

    @property
    def ready(self) -> list[Worker]:
        """The workers that have loaded the model."""
        return [worker for worker in self.members if worker.loaded is not None]

    def submit(self, worker: Worker, task: Task[Any], part: object) -> None:
        """Give a worker a task; `part` says what it is for."""
        worker.calls[self.pool.submit(worker.slot, task)] = part

    def wait(self) -> Iterator[tuple[Worker, Any, Any]]:
        """Yield worker, part and result of each task that is done, after waiting for one for `MAX_WAIT` seconds.

        Of a worker that has died the result is a `WorkerDied` and the part a list of the parts of all its tasks; a
        new one takes its place.
        """
        before = list(self.members)
        self.shared.assign()
        calls = [future for worker in self.members for future in worker.calls]
        joined = any(worker not in before for worker in self.ready)
        done = self.shared.wait(calls, 0.0 if joined else MAX_WAIT)
        for worker in list(self.members):
            for future in [future for future in worker.calls if future in done]:
                try:
                    result = self.pool.result(future)
                except WorkerDied as died:
                    parts = [part for part in worker.calls.values() if part is not None]
                    self._replace(worker, died.how)
                    yield worker, parts, died
                    break
                part = worker.calls.pop(future)
                if part is None:
                    worker.loaded = result
                    self.shared.note_loaded(worker)
                else:
                    yield worker, part, result

    def run_parts(self, parts: deque[P], task: Callable[[Worker, P], Task[Any]]) -> Iterator[list[tuple[P, Any]]]:
        """Yield the parts that are done with the results of their tasks, after each wait, until all are."""
        unfinished = len(parts)
        while unfinished:
            for worker in self.ready:
                # Near the end no part waits for one worker while another has nothing to do.
                while parts and len(worker.calls) < (MAX_CALLS if len(parts) > len(self.members) else 1):
                    part = parts.popleft()
                    self.submit(worker, task(worker, part), part)
            self.more = bool(parts)
            found = []
            for _, part, result in self.wait():
                if isinstance(result, WorkerDied):
                    parts.extendleft(reversed(part))
                else:
                    found.append((part, result))
            unfinished -= len(found)
            yield found
        self.more = False

    def join(self, worker: Worker) -> None:
        """Add a worker, which loads the model."""
        self.members.append(worker)
        self.submit(worker, self.load(worker), None)

    def _replace(self, worker: Worker, how: str) -> None:
        self.members.remove(worker)
        self.shared.say(f"worker {worker.number} has died ({how}); its images go back to the queue")
        self.deaths += 1
        if self.deaths > max(MAX_DEATHS, self.pool.count):
            raise RunError(
                f"workers die before they have done anything ({how}); "
                "run without --workers to see why, or with fewer of them if memory is short."
            )
        self.join(self.shared.restarted(worker))


class SharedPool:
    """Assigns the workers of a pool to the teams of runs.

    Runs have a thread each, because they wait for workers deep inside their code. Only one runs at any time: a
    thread has the `lock` except while it waits for workers. So whatever else the driver's code uses (the global
    random generators, torch's threads, a ledger) is never used by two.
    """

    def __init__(self, pool: WorkerPool, say: Callable[[str], None], *, several: bool = False) -> None:
        """Share a pool; `say` shows a message to the user, `several` is whether there are several runs."""
        self.pool, self.say, self.several = pool, say, several
        self.lock = threading.Condition()
        self.teams: list[Team] = []
        # Workers without a run, and the run whose model each has loaded.
        self.free: dict[Worker, Team | None] = {Worker(slot, slot): None for slot in range(pool.count)}
        self.numbers = pool.count
        self.begun, self.first_loads = time.perf_counter(), set[int]()
        # Runs that have begun or will at once, and have no team yet.
        self.opening = 0
        self.stopped = False

    @contextmanager
    def team(self, load: Callable[[Worker], Task[Any]]) -> Iterator[Team]:
        """Give a team inside; `load` returns the task by which a worker loads the run's model."""
        team = Team(self, load)
        self.teams.append(team)
        self.opening -= 1
        try:
            yield team
        finally:
            self.opening += 1
            self.teams.remove(team)
            self.free |= dict.fromkeys(team.members)
            for worker, loaded in self.free.items():
                self.free[worker] = None if loaded is team else loaded
            team.members.clear()

    def assign(self) -> None:
        """Send workers that have nothing to do to runs that have something."""
        for team in self.teams:
            for worker in [worker for worker in team.ready if not (worker.calls or worker.held)]:
                others = any(other.more and not other.members for other in self.teams)
                if not team.more or (others and len(team.members) > 1):
                    team.members.remove(worker)
                    self.free[worker] = team
        for worker, loaded in list(self.free.items()):
            # Before two share a run, all that can begin have begun.
            teams = [team for team in self.teams if team.more and not (self.opening > 0 and team.members)]
            if not teams:
                return
            team = min(teams, key=lambda team: (len(team.members), team is not loaded))
            del self.free[worker]
            if team is loaded:
                team.members.append(worker)
            else:
                team.join(self._without_calls(worker))
            self.lock.notify_all()

    def _without_calls(self, worker: Worker) -> Worker:
        """Return a worker with nothing to do in the place of one that may still be at work for an earlier run."""
        if all(future.done() for future in worker.calls):
            return Worker(worker.slot, worker.number)
        return self.restarted(worker)

    def restarted(self, worker: Worker) -> Worker:
        """Return a new worker in the place of another."""
        self.pool.restart(worker.slot)
        self.numbers += 1
        return Worker(worker.slot, self.numbers - 1)

    def note_loaded(self, worker: Worker) -> None:
        """Say when all workers are at work for the first time."""
        if len(self.first_loads) < self.pool.count:
            self.first_loads.add(worker.slot)
            if len(self.first_loads) == self.pool.count:
                self.say(f"{self.pool.count} workers at work after {time.perf_counter() - self.begun:.1f} s")

    def wait(self, futures: Sequence[Future[Any]], seconds: float) -> set[Future[Any]]:
        """Return which of these are done, after waiting for one while other runs go on."""
        self.check()
        if futures:
            self.lock.release()
            try:
                return self.pool.wait(futures, seconds)
            finally:
                self.lock.acquire()
                self.check()
        self.lock.wait(seconds)
        self.check()
        return set()

    def check(self) -> None:
        """Raise `Stopped` if the command has ended."""
        if self.stopped:
            raise Stopped

    def run(self, works: Sequence[Callable[[], T]]) -> list[T | RobustkitError]:
        """Do all of these, each in a thread; return what they return, in order, or of those that fail the error.

        At most one more than there are workers run at a time, which is there when one of the others ends.
        """
        room = min(self.pool.count + 1, len(works))
        self.opening, waiting = room, deque(works)
        with ThreadPoolExecutor(room) as executor:
            # Each begins the first work that waits: threads do not get the lock in the order in which they start.
            running = [executor.submit(self._run, waiting, len(works)) for _ in works]
            try:
                concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_EXCEPTION)
                found = dict(future.result() for future in running if future.done())
                return [found[number] for number in sorted(found)]
            finally:
                self.stopped = True
                executor.shutdown(cancel_futures=True)

    def _run(self, waiting: deque[Callable[[], T]], count: int) -> tuple[int, T | RobustkitError]:
        """Do the next work; return its number and what it returns."""
        with self.lock:
            self.check()
            number, work = count - len(waiting), waiting.popleft()
            try:
                return number, work()
            except RobustkitError as error:
                return number, error
            finally:
                self.opening -= not waiting


@contextmanager
def shared_pool(
    workers: int | None, ray: str | None, say: Callable[[str], None], *, several: bool = False
) -> Iterator[SharedPool]:
    """Give a pool of new workers inside (see `open_pool`); of one run the calling thread has the lock."""
    pool = open_pool(workers, ray)
    try:
        shared = SharedPool(pool, say, several=several)
        with threads(torch.get_num_threads()):
            if several:
                yield shared
            else:
                with shared.lock:
                    yield shared
    finally:
        pool.close()
