"""A worker of an evaluation: a process with a model of its own that runs the driver's tasks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from contextvars import Context, copy_context
from dataclasses import replace

import numpy as np
import torch

from robustkit.core.determinism import deterministic_operations, prepare_deterministic
from robustkit.core.devices import ComputeDevice
from robustkit.core.errors import RunError
from robustkit.core.isolation import switch_mode
from robustkit.core.memory import share_device
from robustkit.data.samples import Samples
from robustkit.distributed.pool import State
from robustkit.engine.batching.samples import Admitted
from robustkit.engine.evaluation.block_runner import BlockRunner
from robustkit.engine.evaluation.results import CHECKING, RunResults
from robustkit.engine.evaluation.tasks import Batch, Job, Parcel, Result, Search, Step
from robustkit.engine.evaluation.worker_images import WorkerImages, content_hash, readable
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.engine.progress import Progress
from robustkit.models.classifier import Classifier
from robustkit.models.sources.built import GRADIENT
from robustkit.registry import parse_suite
from robustkit.runs.ledger import Chunk

# Seconds that a step of a slow net may take, with a forward and a backward pass of each sample.
MAX_STEP_SECONDS = 20.0


def load(job: Job, state: State) -> bool:
    """Get ready for a run; return whether the worker reads the images itself. A model is loaded once."""
    torch.set_num_threads(job.threads)
    if earlier := state.pop("worker", None):
        earlier.close()
    prepare_deterministic(job.settings.deterministic)
    share_device(job.processes)
    model = state.get("model")
    if model is None or model.fingerprint != job.model.fingerprint:
        state.clear()
        ComputeDevice(torch.device(job.device)).empty_cache()  # the last run's model is no longer needed
        model = state["model"] = job.model.load(torch.device(job.device)).requires_grad_(False)
        switch_mode(model, False)
    state["worker"] = worker = EvaluationWorker.of(job, model)
    torch.set_num_threads(min(worker.instrumented.threads, job.threads))
    return worker.source.files is not None


def run_step(step: Step, state: State) -> Result:
    """Run a part of a search."""
    worker: EvaluationWorker = state["worker"]
    with worker.kernels():
        return worker.step(step)


def run_batch(batch: Batch, state: State) -> Result:
    """Run one batch of one stage."""
    worker: EvaluationWorker = state["worker"]
    with worker.kernels():
        return worker.run_batch(batch)


class Outbox(Progress):
    """Keeps chunks and messages for the driver, which has the ledger and the display."""

    def __init__(self, source: WorkerImages) -> None:
        """Begin without any."""
        self.source, self.chunks, self.messages = source, list[Chunk](), list[str]()

    def write(self, *chunks: Chunk) -> None:
        """Keep chunks, but not their images."""
        self.chunks += [chunk for chunk in chunks if chunk.verdicts or chunk.flags or chunk.forwards]
        for chunk in chunks:
            for verdict in chunk.verdicts:
                self.source.remove(verdict.position)

    def say(self, text: str) -> None:  # noqa: D102
        self.messages.append(text)

    def take(self) -> tuple[list[Chunk], list[str]]:
        """Return what was kept since the last call."""
        taken = self.chunks, self.messages
        self.chunks, self.messages = [], []
        return taken


class EvaluationWorker(BlockRunner):
    """A block runner whose samples come from the driver and whose results go there."""

    ledger: Outbox
    source: WorkerImages
    write_every = 0.0

    @classmethod
    def of(cls, job: Job, model: Classifier) -> EvaluationWorker:
        """Return the worker of a run, with the model measured; the driver has found out whether it is random."""
        data, settings = job.data.get(), job.settings
        if not readable(data.source, data.rows):
            data = replace(data, source=None)
        source = WorkerImages(data)
        outbox = Outbox(source)
        threat = settings.threat
        entries = parse_suite(
            settings.suite, threat.norm, minimal=threat.minimal, gradients=model.access == GRADIENT
        )
        settings = replace(settings, entries=entries)
        n = len(data.labels)
        worker = cls(
            Samples(data.name, data.labels, None, source, np.arange(n)),
            settings,
            outbox,
            RunResults.of(n, [entry.spec for entry in settings.entries]),
            InstrumentedModel(model, torch.device(job.device), settings.precision),
            outbox,
            worker=(job.number,),
            store=job.store.here(),
        )
        worker.source = source
        worker.prepare()
        worker.instrumented.random = job.random
        if worker.instrumented.slow_batch is not None:
            # What is under way is saved after a step.
            most = int(MAX_STEP_SECONDS / (3 * worker.instrumented.seconds))
            worker.slots = min(worker.slots, max(1, most))
        return worker

    def kernels(self) -> AbstractContextManager[None]:
        """Return a context with the kernels that the run allows."""
        return deterministic_operations(self.settings.deterministic, self.instrumented.device)

    def __post_init__(self) -> None:
        """Begin without a search."""
        super().__post_init__()
        self.search: Search | None = None
        self.looks: Iterator[None] | None = None
        self.context: Context = copy_context()
        self.incoming = np.zeros(0, np.int64)
        self.last = False

    def close(self) -> None:
        """End the work for this run."""
        self.source.close()
        self._end_search()

    def _end_search(self) -> None:
        """End an unfinished search; what it has seeded and set is as before."""
        if self.looks is not None:
            self.context.run(self.looks.close)  # type: ignore[attr-defined]

    def task_name(self, first: int) -> str:
        """Return the name that the driver has given to the search."""
        assert self.search is not None  # noqa: S101
        return self.search.name

    def unsettled(self, first: int) -> np.ndarray:
        """Return the positions that the driver has given so far."""
        return self.incoming

    def step(self, step: Step) -> Result:
        """Continue with the search until the step's time is over, or there is nothing to do."""
        for _, rows in step.resume:
            self.source.add(rows.host["position"], rows.device["x"].numpy())
        self._receive(step.parcel)
        if self.search is None or step.search.name != self.search.name:
            self._begin(step)
        else:
            self.incoming = np.concatenate([self.incoming, step.parcel.positions])
        self.last |= step.last
        released = [
            (queue, rows.to(torch.device("cpu")))
            for queue, rows in (self.batch.give_half() if step.release and self.batch else ())
        ]
        end = time.perf_counter() + step.seconds
        while self.looks is not None and self._has_work and time.perf_counter() < end:
            try:
                # What the search sets in its context stays there between steps.
                self.context.run(next, self.looks)
            except StopIteration:
                self.looks = None
        return Result(
            *self.ledger.take(),
            self.slots - (self.batch.active if self.batch else 0) - len(self.incoming),
            self.batch.progress if self.batch else 0.0,
            released,
            self.looks is None,
            self.search_facts,
        )

    def _begin(self, step: Step) -> None:
        self._end_search()
        self.search, self.last = step.search, False
        first, count = step.search.first, step.search.count
        self.results.flags = dict(step.search.flags)
        if any(entry.view for entry in self.settings.attacks_from(first, count)):
            self.reliability.find_views()
        resumed = [position for _, rows in step.resume for position in rows.host["position"].tolist()]
        self.incoming = step.parcel.positions[~np.isin(step.parcel.positions, resumed)]
        active = [(queue, rows.to(self.instrumented.device)) for queue, rows in step.resume]
        self.context = copy_context()
        self.looks = self.run_admitted(
            first, count, self._without_started, np.arange(len(self.source.first)), active
        )

    def _without_started(self, started: Sequence[int]) -> Callable[[int], Admitted]:
        """Return what admits the samples that steps bring, without those that have been started before."""
        self.incoming = self.incoming[~np.isin(self.incoming, started)]
        return self._admit

    def _admit(self, free: int) -> Admitted:
        chosen, self.incoming = self.incoming[:free], self.incoming[free:]
        later = not self.last or len(self.incoming) > 0
        return self._admission(chosen)(free)._replace(later=later)

    @property
    def _has_work(self) -> bool:
        """Whether there are samples, or the end of the search is left to do."""
        return self.batch is None or self.batch.active > 0 or len(self.incoming) > 0 or self.last

    def run_batch(self, batch: Batch) -> Result:
        """Run one batch of one stage."""
        positions, files = batch.parcel.positions, self.source.files
        if batch.content and files and content_hash(files.source, files.rows[positions]) != batch.content:
            raise RunError(
                f"the image files of {self.samples.name} on a worker's machine differ from the driver's; "
                "make them equal, or remove them there."
            )
        self._receive(batch.parcel)
        images = self.samples.images(positions)
        if (batch.stage, batch.number) == (0, CHECKING):
            self._run_chunk(0, CHECKING, positions, images, self._check)
        elif batch.stage == 0:
            self._run_chunk(0, batch.number, positions, images, self._clean_verdicts)
        else:
            if self.settings.entries[batch.stage - 1].view:
                self.reliability.find_views()
            self.run_attack_chunk(batch.stage, batch.number, positions, images)
        for position in positions.tolist():
            self.source.remove(position)
        return Result(*self.ledger.take(), facts=self.search_facts)

    def _receive(self, parcel: Parcel) -> None:
        if parcel.hashes:
            for row, position in enumerate(parcel.positions.tolist()):
                self.results.images[position] = parcel.hashes[row]
                self.results.clean_margins[position], self.results.margins[position] = parcel.margins[row]
        self.source.add(parcel.positions, parcel.images)
