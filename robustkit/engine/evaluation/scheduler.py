"""The driver of a run with several workers: gives them samples, and writes their verdicts to the ledger.

Verdicts do not depend on the worker: a sample's numbers are its own, and attacks whose numbers depend on the batch
get the batches of a run with one process. A random model's draws are each worker's own.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from robustkit.distributed.pool import Task
from robustkit.distributed.sent_models import SentModel
from robustkit.distributed.sharing import SharedPool, Worker
from robustkit.engine.evaluation import evaluate_worker
from robustkit.engine.evaluation.batch_runner import MAX_CHECKED
from robustkit.engine.evaluation.block_runner import BlockRunner
from robustkit.engine.evaluation.results import CHECKING
from robustkit.engine.evaluation.search_scheduler import SearchScheduler
from robustkit.engine.evaluation.tasks import Batch, Data, Job, Parcel, Result
from robustkit.engine.evaluation.worker_images import content_hash
from robustkit.engine.model.instrumented_model import MAX_TRIAL_BATCH
from robustkit.runs.ledger import Chunk

# Facts of workers that add up; of the others the record has what they agree on, or all of it.
SUMS = ("claims_refused", "searched_again", "trial_images")
# Stage, number and positions of a batch.
Part = tuple[int, int, np.ndarray]


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
                processes=pool.processes_per_device(self.instrumented.device),
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
                self.keep(result)
                self.done += 0 if number == CHECKING else len(positions)
            now = time.perf_counter()
            if not any(worker.calls for worker in self.team.ready) and not finished:
                written = now  # all workers are loading the model
            elif self.finished:
                self.write(self.finished, now - written)
                written = now
            self.show_progress(0.0)
        self._finish()

    def _batch(self, worker: Worker, part: Part) -> Task[Result]:
        stage, number, positions = part
        content = None
        if worker.loaded and stage == 0:
            content = content_hash(self.samples.source, self.samples.rows[positions])
        batch = Batch(stage, number, self.parcel(worker, positions), content)
        return partial(evaluate_worker.run_batch, batch)

    def keep(self, result: Result) -> int:
        """Keep what a worker has done until it is written; return the number of verdicts."""
        for message in result.messages:
            self.progress.say(message)
        self.finished += result.chunks
        if result.chunks:
            self.team.deaths = 0
        verdicts = [verdict for chunk in result.chunks for verdict in chunk.verdicts]
        self.unwritten += sum(len(verdict.adversarial or b"") for verdict in verdicts)
        return len(verdicts)

    def show_progress(self, unfinished: float) -> None:
        """Show the progress; TimeUp if the time is over."""
        self.progress.advance(self.done + unfinished, self.results.robust)
        self._check_deadline()

    def _finish(self) -> None:
        self._wait_for_ledger()
        self.search_facts = {**_agreed(list(self.facts.values())), "workers": self.team.pool.count}

    def write(self, chunks: list[Chunk], seconds: float) -> None:
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

    def parcel(self, worker: Worker, positions: Sequence[int] | np.ndarray, *, images: bool = True) -> Parcel:
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


def _agreed(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the facts of several workers as those of one run."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for one in facts for name in one):
        values = [one[name] for one in facts if one.get(name) is not None]
        if name in SUMS:
            found[name] = sum(values)
        elif name == "rounding":
            found[name] = max(values, default=0.0)
        elif name == "occupancy":
            found[name] = sum(values) / len(values) if values else None
        else:
            distinct = list(dict.fromkeys(values))
            # A command that leaves it open is the one that repeats a run of several precisions.
            several = "auto" if name == "precision" else distinct
            found[name] = distinct[0] if len(distinct) == 1 else several
    return found
