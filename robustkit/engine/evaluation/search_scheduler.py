"""Gives the samples of row-wise attacks to workers as they have free rows, in steps of a fraction of a second."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from robustkit.distributed.pool import WorkerDied
from robustkit.distributed.sharing import MAX_CALLS, Worker
from robustkit.engine.batching.saved_rows import SavedRows
from robustkit.engine.evaluation import evaluate_worker
from robustkit.engine.evaluation.tasks import GivenRows, Result, Search, Step
from robustkit.runs.ledger import Chunk

if TYPE_CHECKING:
    from robustkit.engine.evaluation.scheduler import Scheduler

# Seconds of a step: a worker returns its results and gets new samples so often.
STEP_SECONDS = 0.3
# A worker gets no more at once than this share of its part of the queue, so that the last go out one by one.
SHARES = 2
# Samples that a worker must have before others are given some of them, and seconds between two attempts.
WORTH_SPLITTING = 4
SPLIT_EVERY = 0.5
# The most bytes of adversarial images that wait to be written: workers may wait for the driver while it writes.
MAX_UNWRITTEN_BYTES = 32 << 20


@dataclass
class WorkerSearch:
    """What the driver knows of a worker's search.

    Attributes:
        search: the attacks.
        free: rows that it can run more at once, counting samples on their way as run.
        pace: samples that it finished in its last step.
        progress: of its unfinished samples.
        last: whether it was told that no more samples will come.
    """

    search: Search
    free: int
    pace: int = 0
    progress: float = 0.0
    last: bool = False


def samples_to_send(free: int, pace: int, queue: int, workers: int) -> int:
    """Return how many samples a worker gets with its next step, so that its rows stay in use and none is idle.

    Args:
        free: rows that it can run more at once; negative if samples wait for one.
        pace: samples that it finished in its last step.
        queue: samples that no worker has.
        workers: that share them.
    """
    # Another step is in flight, and samples finish in both; near the end none waits for a busy worker.
    ahead = 2 * pace if queue > 2 * SHARES * workers * pace else 0
    return max(0, min(free + ahead, max(1, queue // (SHARES * workers)), queue))


class SearchScheduler:
    """Gives the samples of consecutive row-wise attacks to workers.

    Attributes:
        queue: positions that no worker has.
        saved: names and positions of searches that were interrupted.
        given: rows that a worker gave away, for a worker that has none.
        searches: the unfinished search of each worker.
    """

    def __init__(self, driver: Scheduler, first: int, count: int) -> None:
        """Begin with nothing to do."""
        self.driver, self.team, self.first, self.count = driver, driver.team, first, count
        self.queue, self.saved = deque[int](), deque[tuple[str, list[int]]]()
        self.given = deque[GivenRows]()
        self.searches: dict[Worker, WorkerSearch] = {}
        self.split = 0.0

    def run(self, waiting: np.ndarray) -> None:
        """Return when there is a verdict on each of these positions."""
        driver = self.driver
        driver.done, written = 0, time.perf_counter()
        self._return(waiting.tolist())
        # Also until the last steps have returned: they bring the facts of their searches.
        while self._to_begin or self.searches or any(worker.calls for worker in self.team.ready):
            for worker in self.team.ready:
                self._submit_steps(worker)
            self._split()
            self.team.more = self._to_begin or self._most_held() is not None
            for worker, part, result in self.team.wait():
                if isinstance(result, WorkerDied):
                    self._take_back(worker)
                else:
                    self._note(worker, part[0], result)
            now = time.perf_counter()
            if not self.searches:
                written = now  # all workers are loading the model
            due = now - written > driver.write_every or now > driver.deadline
            if driver.finished and (due or driver.unwritten > MAX_UNWRITTEN_BYTES):
                self._write(now - written)
                written = now
            driver.show_progress(sum(search.progress for search in self.searches.values()))
        self.team.more = False
        if driver.finished:
            self._write(time.perf_counter() - written)

    @property
    def _to_begin(self) -> bool:
        """Whether there is anything that no worker has."""
        return bool(self.queue or self.saved or self.given)

    def _submit_steps(self, worker: Worker) -> None:
        """Give a worker as many steps as it may have at once, with samples for its free rows."""
        while len(worker.calls) < MAX_CALLS:
            state = self.searches.get(worker)
            if state is None:
                if not self._begin(worker):
                    return
                continue
            positions: list[int] = []
            if not state.last:
                count = samples_to_send(state.free, state.pace, len(self.queue), self.team.count)
                positions = [self.queue.popleft() for _ in range(count)]
                state.last = not self.queue
            self._submit(worker, state, positions)

    def _begin(self, worker: Worker) -> bool:
        """Begin a search of a worker if there is anything to do."""
        if not self._to_begin:
            return False
        name, positions = f"{self.driver.task_name(self.first)}-{time.time_ns()}", list[int]()
        rows: GivenRows = ()
        if self.saved:
            name, positions = self.saved.popleft()
        elif self.given:
            rows = self.given.popleft()
            positions = _positions(rows)
        search = Search(self.first, self.count, name, self.driver.results.flags)
        state = self.searches[worker] = WorkerSearch(search, self.driver.slots)
        if positions:
            self._submit(worker, state, positions, resume=rows)
        return True

    def _submit(
        self, worker: Worker, state: WorkerSearch, positions: Sequence[int], *, resume: GivenRows = ()
    ) -> None:
        parcel = self.driver.parcel(worker, positions, images=not resume)
        worker.held.update(positions)
        state.free -= len(positions)
        step = Step(state.search, parcel, STEP_SECONDS, state.last, resume)
        self.team.submit(worker, partial(evaluate_worker.run_step, step), (state, len(positions)))

    def _note(self, worker: Worker, state: WorkerSearch, result: Result) -> None:
        """Take in the result of a step of that search."""
        self.driver.done += self.driver.keep(result)
        finished = [verdict.position for chunk in result.chunks for verdict in chunk.verdicts]
        worker.held.difference_update(finished)
        if result.released:
            worker.held.difference_update(_positions(result.released))
            self.given.append(result.released)
        if self.searches.get(worker) is state:
            on_their_way = sum(count for other, count in worker.calls.values() if other is state)
            state.free, state.pace, state.progress = result.free - on_their_way, len(finished), result.progress
            if result.ended:
                del self.searches[worker]
                self.driver.facts[worker] = result.facts

    def _take_back(self, worker: Worker) -> None:
        """Return what a dead worker had to the queue; rows that it saved continue from there."""
        state = self.searches.pop(worker, None)
        self._return(worker.held, state.search.name if state else "")

    def _return(self, positions: Collection[int], name: str = "") -> None:
        """Add positions to the queue, without those of searches that were saved (of that name, or of any)."""
        left, own, store = set(positions), self.driver.task_name(self.first), self.driver.store
        for saved in [name] if name else store.names(own):
            state = store.state(saved) if saved == own or saved.startswith(f"{own}-") else None
            if state is not None and (found := SavedRows.positions_in(state) & left):
                left -= found
                self.saved.append((saved, sorted(found)))
        self.queue.extendleft(sorted(left, reverse=True))

    def _most_held(self) -> Worker | None:
        """Return the worker with most samples, if they are enough to be divided."""
        most = max(self.searches, key=lambda worker: len(worker.held), default=None)
        return most if most is not None and len(most.held) >= WORTH_SPLITTING else None

    def _split(self) -> None:
        """Have the worker with most samples give every other row away if there is nothing else for an idle one."""
        idle = any(not (worker.calls or worker in self.searches) for worker in self.team.ready)
        most, now = self._most_held(), time.perf_counter()
        if most is None or not idle or now - self.split < SPLIT_EVERY:
            return
        self.split = now
        state = self.searches[most]
        step = Step(state.search, self.driver.parcel(most, []), 0.0, state.last, release=True)
        self.team.submit(most, partial(evaluate_worker.run_step, step), (state, 0))

    def _write(self, seconds: float) -> None:
        """Write what has finished as one chunk for each stage."""
        number, finished = self.driver.results.next_chunk(self.first), self.driver.finished
        stages = range(self.first, self.first + self.count)
        self.driver.write([_sum(stage, number, finished) for stage in stages], seconds)


def _positions(rows: GivenRows) -> list[int]:
    return [position for _, part in rows for position in part.host["position"].tolist()]


def _sum(stage: int, number: int, chunks: Sequence[Chunk]) -> Chunk:
    """Return the chunks of a stage as one."""
    own = [chunk for chunk in chunks if chunk.stage == stage]
    return Chunk(
        stage,
        number,
        sum(chunk.forwards for chunk in own),
        sum(chunk.backwards for chunk in own),
        0.0,
        [verdict for chunk in own for verdict in chunk.verdicts],
        [flag for chunk in own for flag in chunk.flags],
    )
