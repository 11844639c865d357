"""The driver of a run with several workers: gives them samples, and writes their verdicts to the ledger.

Verdicts do not depend on the worker: a sample's numbers are its own, and attacks whose numbers depend on the batch
get the batches of a run with one process. A random model's draws are each worker's own.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from robustkit.distributed.pool import Task, WorkerDied
from robustkit.distributed.sent_models import SentModel
from robustkit.distributed.sharing import MAX_CALLS, SharedPool, Worker
from robustkit.engine.batching.saved_rows import SavedRows
from robustkit.engine.evaluation import evaluate_worker
from robustkit.engine.evaluation.batch_runner import MAX_CHECKED
from robustkit.engine.evaluation.block_runner import BlockRunner
from robustkit.engine.evaluation.evaluate_worker import content_hash
from robustkit.engine.evaluation.results import CHECKING
from robustkit.engine.evaluation.tasks import Batch, Data, GivenRows, Job, Parcel, Result, Search, Step
from robustkit.engine.model.instrumented_model import MAX_TRIAL_BATCH
from robustkit.runs.ledger import Chunk

# Seconds of a step: a worker returns its results and gets new samples so often.
STEP_SECONDS = 0.3
# A worker gets no more at once than this share of its part of the queue, so that the last go out one by one.
SHARES = 2
# Samples that a worker must have before others are given some of them, and seconds between two attempts.
WORTH_SPLITTING = 4
SPLIT_EVERY = 0.5
# The most bytes of adversarial images that wait to be written: workers may wait for the driver while it writes.
MAX_UNWRITTEN_BYTES = 32 << 20
# Facts of workers that add up; of the others the record has what they agree on, or all of it.
SUMS = ("claims_refused", "searched_again")
# Stage, number and positions of a batch.
Part = tuple[int, int, np.ndarray]


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


@dataclass
class Scheduler(BlockRunner):
    """Has clean pass, checks and attacks run by workers."""

    def __post_init__(self) -> None:
        """Begin without results."""
        super().__post_init__()
        self.facts: dict[Worker, Mapping[str, Any]] = {}
        self.finished: list[Chunk] = []
        self.done = self.unwritten = 0
        # Writing and hashing images takes most of the driver's time: it is done while workers are served.
        self.thread = ThreadPoolExecutor(1, "ledger")
        self.writing: Future[None] | None = None

    @contextmanager
    def using(self, shared: SharedPool) -> Iterator[None]:
        """Have workers inside."""
        samples, pool = self.samples, shared.pool
        model = SentModel.of(pool, self.instrumented.model)
        images = samples.images(range(min(MAX_TRIAL_BATCH, len(samples)))).numpy()
        # Reading image files takes long; arrays are in memory and sent in parts.
        source = samples.source if samples.source.slow else None
        data = pool.share(Data(samples.name, samples.labels, images, source, samples.rows), "the data")

        def load(worker: Worker) -> Task[bool]:
            job = Job(
                number=worker.number,
                model=model,
                data=data,
                settings=replace(self.settings, slots=self.slots, entries=[]),
                device=pool.device(self.instrumented.device, worker.slot),
                threads=pool.threads,
                random=self.instrumented.random,
                store=self.store,
            )
            return partial(evaluate_worker.load, job)

        with shared.team(load) as self.team:
            try:
                yield
            finally:
                self._wait_for_ledger()
                self.thread.shutdown()

    def run_clean(self, positions: np.ndarray) -> None:
        """Have the clean pass and the checks run."""
        parts = [(0, number, chunk) for number, chunk in self._chunks(0, positions)]
        images = sum(len(chunk) for *_, chunk in parts)
        if (0, CHECKING) not in self.results.chunks:
            # The checks take longer than a batch, so they start early.
            checked = np.arange(min(self.settings.batch_size, MAX_CHECKED))
            parts.insert(1, (0, CHECKING, checked))
        self.progress.stage("clean", images, self.results.robust, self.results.n)
        self._run_parts(parts)

    def run_attack(self, stage: int, positions: np.ndarray) -> None:
        """Have one attack run on the robust ones of these images, in the batches of a run with one process."""
        self._announce(stage, positions)
        self._run_parts([(stage, number, chunk) for number, chunk in self._chunks(stage, positions)])

    def _run_parts(self, parts: Sequence[Part]) -> None:
        self.done = 0
        written = time.perf_counter()
        for finished in self.team.run_parts(deque(parts), self._batch):
            for (_, number, positions), result in finished:
                self._note(result)
                self.done += 0 if number == CHECKING else len(positions)
            now = time.perf_counter()
            if not any(worker.calls for worker in self.team.ready) and not finished:
                written = now  # all workers are loading the model
            elif self.finished:
                self._write(self.finished, now - written)
                written = now
            self._advance(0.0)
        self._finish()

    def _batch(self, worker: Worker, part: Part) -> Task[Result]:
        stage, number, positions = part
        content = None
        if worker.loaded and stage == 0:
            content = content_hash(self.samples.source, self.samples.rows[positions])
        batch = Batch(stage, number, self._parcel(worker, positions), content)
        return partial(evaluate_worker.run_batch, batch)

    def _note(self, result: Result) -> int:
        """Keep what a worker has done until it is written; return the number of verdicts."""
        for message in result.messages:
            self.progress.say(message)
        self.finished += result.chunks
        if result.chunks:
            self.team.deaths = 0
        verdicts = [verdict for chunk in result.chunks for verdict in chunk.verdicts]
        self.unwritten += sum(len(verdict.adversarial or b"") for verdict in verdicts)
        return len(verdicts)

    def _advance(self, unfinished: float) -> None:
        """Show the progress; TimeUp if the time is over."""
        self.progress.advance(self.done + unfinished, self.results.robust)
        self._check_deadline()

    def _finish(self) -> None:
        self._wait_for_ledger()
        self.search_facts = {**_agreed(list(self.facts.values())), "workers": self.team.pool.count}

    def _write(self, chunks: list[Chunk], seconds: float) -> None:
        """Write chunks, which share the seconds by their passes."""
        total = max(sum(chunk.forwards + chunk.backwards for chunk in chunks), 1)
        chunks = [replace(chunk, seconds=seconds * (chunk.forwards + chunk.backwards) / total) for chunk in chunks]
        self.finished, self.unwritten = [], 0
        self._wait_for_ledger()
        self.writing = self.thread.submit(self.ledger.write, *chunks)
        for chunk in chunks:
            self.results.add(chunk)

    def _wait_for_ledger(self) -> None:
        """Wait until everything is written; RunError if that failed."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def _parcel(self, worker: Worker, positions: Sequence[int] | np.ndarray, *, images: bool = True) -> Parcel:
        """Return samples for a worker, with their images unless it has or reads them."""
        index = np.asarray(positions, np.int64)
        sent = self.samples.images(index).numpy() if images and not worker.loaded else None
        known = self.results.judged[index] >= 0
        hashes = self.results.images.digests(index) if known.all() else []
        margins = np.stack([self.results.clean_margins[index], self.results.margins[index]], 1)
        return Parcel(index, sent, hashes, margins)

    def run_row_wise(self, first: int, count: int, positions: np.ndarray) -> None:
        """Have `count` row-wise attacks run on those of these that are still robust, as workers have free rows."""
        waiting = self.results.waiting(first, positions)
        self.progress.stage(self._title(first, count), len(waiting), self.results.robust, self.results.n)
        SearchScheduler(self, first, count).run(waiting)
        self._finish()


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
            driver._advance(sum(search.progress for search in self.searches.values()))
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
        parcel = self.driver._parcel(worker, positions, images=not resume)
        worker.held.update(positions)
        state.free -= len(positions)
        step = Step(state.search, parcel, STEP_SECONDS, state.last, resume)
        self.team.submit(worker, partial(evaluate_worker.run_step, step), (state, len(positions)))

    def _note(self, worker: Worker, state: WorkerSearch, result: Result) -> None:
        """Take in the result of a step of that search."""
        self.driver.done += self.driver._note(result)
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
        step = Step(state.search, self.driver._parcel(most, []), 0.0, state.last, release=True)
        self.team.submit(most, partial(evaluate_worker.run_step, step), (state, 0))

    def _write(self, seconds: float) -> None:
        """Write what has finished as one chunk for each stage."""
        number, finished = self.driver.results.next_chunk(self.first), self.driver.finished
        stages = range(self.first, self.first + self.count)
        self.driver._write([_sum(stage, number, finished) for stage in stages], seconds)


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


def _agreed(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the facts of several workers as those of one run."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for one in facts for name in one):
        values = [one[name] for one in facts if one.get(name) is not None]
        if name in SUMS:
            found[name] = sum(values)
        elif name == "occupancy":
            found[name] = sum(values) / len(values) if values else None
        else:
            distinct = list(dict.fromkeys(values))
            # A command that leaves it open is the one that repeats a run of several precisions.
            several = "auto" if name == "precision" else distinct
            found[name] = distinct[0] if len(distinct) == 1 else several
    return found
