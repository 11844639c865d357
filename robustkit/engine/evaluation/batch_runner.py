"""Runs chunks batch by batch: the clean pass, the checks, and attacks that take a whole batch at once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import torch

from robustkit.checks.probe import Probe
from robustkit.checks.run import diagnose
from robustkit.core.criteria import Goal
from robustkit.core.errors import RobustkitError, RunError
from robustkit.core.flags import Flag
from robustkit.core.isolation import own_randomness
from robustkit.core.out_of_memory import retry_in_memory
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images, Labels
from robustkit.data.prefetch import read_ahead
from robustkit.data.samples import Samples
from robustkit.engine.evaluation.early_stopping import TimeUp
from robustkit.engine.evaluation.ledger_writer import LedgerWriter, Sink, noticed
from robustkit.engine.evaluation.minimum_norm import Nearest, search
from robustkit.engine.evaluation.results import CHECKING, RunResults
from robustkit.engine.evaluation.sanity import check_logits
from robustkit.engine.evaluation.settings import RunSettings
from robustkit.engine.evaluation.verdicts import image_hashes, judge, sample_ids
from robustkit.engine.model.instrumented_model import InstrumentedModel, halve_micro_batch
from robustkit.engine.progress import Progress
from robustkit.models.failures import described
from robustkit.registry import SuiteEntry
from robustkit.runs.ledger import Chunk, Verdict
from robustkit.runs.recorded_outputs import OutputRecord, recording
from robustkit.runs.unfinished_work import Store

# The most images that the checks use.
MAX_CHECKED = 64

T = TypeVar("T")
Work = Callable[[Images, np.ndarray], tuple[list[Verdict], list[Flag]]]


@dataclass
class BatchRunner:
    """Runs the clean pass, the checks and attacks that take a whole batch: one chunk of images after the other.

    `BlockRunner` adds the attacks whose images share passes.

    Attributes:
        samples: the images and labels.
        settings: what the run does.
        ledger: where chunks are written.
        results: the verdicts so far.
        instrumented: the model.
        progress: receives events.
        deadline: on `time.perf_counter`; past it the run ends in `TimeUp`.
        store: keeps unfinished work, from which a killed run continues.
        worker: the number of this worker, of a run with several; empty for the main process. It separates a random
            model's random numbers in one worker from those in another.
    """

    samples: Samples
    settings: RunSettings
    ledger: Sink
    results: RunResults
    instrumented: InstrumentedModel
    progress: Progress
    deadline: float = field(default=math.inf, kw_only=True)
    store: Store = field(default=Store(None), kw_only=True)
    worker: tuple[int, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        """Create the verdict writer."""
        self.writer = LedgerWriter(self.ledger, self.results, self.instrumented)

    def run_clean(self, positions: np.ndarray) -> None:
        """Run the clean pass over these images, and the checks unless they have run."""
        results = self.results
        self.progress.stage("clean", len(positions), results.robust, results.n)
        for number, chunk, x in self._pending(0, positions):
            self._run_chunk(0, number, chunk, x, self._clean_verdicts)
        if (0, CHECKING) not in results.chunks:
            first = np.arange(min(self.settings.batch_size, MAX_CHECKED))
            self._run_chunk(0, CHECKING, first, self.samples.images(first), self._check)

    def run_attack(self, stage: int, positions: np.ndarray) -> None:
        """Run one attack over the images of these that are still robust."""
        self._announce(stage, positions)
        done = 0
        for number, chunk, x in self._pending(stage, positions):
            self.run_attack_chunk(stage, number, chunk, x, done)
            done += len(chunk)

    def _announce(self, stage: int, positions: np.ndarray) -> None:
        images = len(self.results.waiting(stage, positions))
        name = "minimum norms" if self.settings.threat.minimal else self.results.names[stage]
        self.progress.stage(name, images, self.results.robust, self.results.n)

    def run_attack_chunk(self, stage: int, number: int, positions: np.ndarray, x: Images, done: int = 0) -> None:
        """Run one attack on a chunk of images, `done` images after the stage's first.

        For a minimum-norm threat all attacks run, since each starts from the points that those before it found.
        """
        entry = self.settings.entries[stage - 1]
        budgets = [
            getattr(one.attack, "budget", None)
            for one in (self.settings.entries if self.settings.threat.minimal else [entry])
        ]
        expected = sum(
            budget(self.instrumented.num_classes, self.settings.threat.norm) if budget else 0 for budget in budgets
        )
        stream, before, images = self._stream(stage), self.instrumented.forwards, len(positions)

        def verdicts(x: Images, positions: np.ndarray) -> tuple[list[Verdict], list[Flag]]:
            return self._attack_verdicts(entry, stream, x, positions)

        def report_progress(forwards: int) -> None:
            share = (forwards - before) / (expected * images) if expected else 0.0
            self.progress.advance(done + min(share, 0.99) * images, self.results.robust)

        self.instrumented.on_forward = report_progress
        if self.settings.threat.minimal:
            self._run_minimum_norm_chunk(number, positions, x)
        else:
            self._run_chunk(stage, number, positions, x, verdicts)
        self.instrumented.on_forward = lambda forwards: None

    def _run_minimum_norm_chunk(self, number: int, positions: np.ndarray, x: Images) -> None:
        """Search for the nearest points by all attacks; write a chunk of this number for each attack."""
        labels = torch.from_numpy(self.samples.labels[positions]).to(self.instrumented.device)

        def work(x: Images, positions: np.ndarray) -> Nearest:
            self.check_images(positions, image_hashes(x))
            self.instrumented.detached = False
            ids = self.ids(positions)
            return search(
                self.instrumented,
                self.settings.entries,
                x,
                labels,
                self.settings.threat,
                seed=self.settings.seed,
                ids=ids,
            )

        with self._result_of(1, number, positions, x, work) as (found, seconds):
            rows = self.writer.verdicts(found.judged, positions, self.samples.labels[positions])
            distances, attacks = found.distance.tolist(), (found.attack % len(self.settings.entries)).cpu().numpy()
            rows = [
                replace(row, distance=d) if row.fooled else row for row, d in zip(rows, distances, strict=True)
            ]
            flags = noticed(0, int(found.judged.broken.sum()), self.instrumented)
            total = max(sum(map(sum, found.spent)), 1)
            self.writer.write(
                *(
                    Chunk(
                        stage,
                        number,
                        *spent,
                        seconds * sum(spent) / total,
                        [rows[index] for index in np.flatnonzero(attacks == stage - 1)],
                        flags if stage == 1 else [],
                    )
                    for stage, spent in enumerate(found.spent, 1)
                )
            )

    def _chunks(self, stage: int, positions: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """Return number and positions of the chunks that a stage has still to run.

        They are cut from all images that enter the stage, finished ones included: an attack whose random numbers
        depend on the batch gets the same batches in any order, and after a resume.
        """
        size = self.settings.batch_size
        entering = positions[self.results.fooled_at[positions] >= stage]
        taken = {chunk for number, chunk in self.results.chunks if number == stage}
        free, chunks = self.results.next_chunk(stage), []
        for index, begin in enumerate(range(0, len(entering), size)):
            left = self.results.waiting(stage, entering[begin : begin + size])
            if len(left):
                number = free if index in taken else index
                taken.add(number)
                free = max(free, number + 1)
                chunks.append((number, left))
        return chunks

    def _pending(self, stage: int, positions: np.ndarray) -> Iterator[tuple[int, np.ndarray, Images]]:
        """Yield number, positions and images of the stage's chunks one by one."""
        done, chunks = 0, self._chunks(stage, positions)
        batches = read_ahead(self.samples, [chunk for _, chunk in chunks])
        for (number, _), (chunk, x) in zip(chunks, batches, strict=True):
            self._check_deadline()
            yield number, chunk, x
            done += len(chunk)
            self.progress.advance(done, self.results.robust)

    def _check_deadline(self) -> None:
        if time.perf_counter() > self.deadline:
            raise TimeUp

    def _run_chunk(self, stage: int, number: int, positions: np.ndarray, x: Images, work: Work) -> None:
        """Run one chunk and write it to the ledger."""
        forwards, backwards = self.instrumented.forwards, self.instrumented.backwards
        with self._result_of(stage, number, positions, x, work) as ((verdicts, flags), seconds):
            spent = self.instrumented.forwards - forwards, self.instrumented.backwards - backwards
            self.writer.write(Chunk(stage, number, *spent, seconds, verdicts, flags))

    @contextmanager
    def _result_of(
        self, stage: int, number: int, positions: np.ndarray, x: Images, work: Callable[[Images, np.ndarray], T]
    ) -> Iterator[tuple[T, float]]:
        """Run the work of a chunk and yield its result and seconds; delete its records once it was written inside.

        Out of memory halves the micro-batch and runs the work again.
        """
        name = self.results.names[stage]
        x = x.to(self.instrumented.device)
        instrumented = self.instrumented
        before = instrumented.forwards, instrumented.backwards

        def run() -> tuple[T, OutputRecord]:
            instrumented.forwards, instrumented.backwards = before
            with (
                own_randomness(self.settings.seed, stage, number),
                instrumented.using(instrumented.config),
                recording(self.store, f"chunk-{stage}-{number}") as record,
            ):
                records.append(record)
                return work(x, positions), record

        def reduce() -> None:
            records.pop().restart()
            self._halve_micro_batch(len(x))

        records = list[OutputRecord]()
        try:
            found, record = retry_in_memory(run, reduce, instrumented.device)
        except RobustkitError:
            raise
        except Exception as error:
            raise RunError(
                f"{name} failed on images {positions[0]} to {positions[-1]} with {described(error)}."
            ) from error
        yield found, record.seconds
        record.restart()

    def _clean_verdicts(self, x: Images, positions: np.ndarray) -> tuple[list[Verdict], list[Flag]]:
        logits = self.instrumented.logits_fp32(x)
        labels = self.samples.labels[positions]
        check_logits(logits, labels, positions)
        y = torch.from_numpy(labels).to(x.device)
        # The float32 logits are known already, but those of a random model are drawn again.
        judged = judge(self.instrumented, x, y, x, self.settings.threat, logits, chosen=False)
        rows = zip(self.writer.verdicts(judged, positions, labels), image_hashes(x), strict=True)
        return [replace(verdict, image=image, adversarial=None, struck=None) for verdict, image in rows], []

    def _check(self, x: Images, positions: np.ndarray) -> tuple[list[Verdict], list[Flag]]:
        labels = torch.from_numpy(self.samples.labels[positions]).to(x.device)
        threat = self.settings.threat.typical() if self.settings.threat.minimal else self.settings.threat
        separate = InstrumentedModel(self.instrumented.model, self.instrumented.device)
        for name in ("micro_batch", "slow_batch", "differentiable", "backward_error"):
            setattr(separate, name, getattr(self.instrumented, name))
        attacks = [entry.attack for entry in self.settings.entries if not entry.view]
        # The binarization check needs gradients.
        net = None if separate.backward_error else separate.model
        flags = diagnose(Probe(separate, x, labels, threat, attacks, self.settings.seed, net))
        self.instrumented.forwards += separate.forwards
        self.instrumented.backwards += separate.backwards
        return [], flags

    def _attack_verdicts(
        self, entry: SuiteEntry, stream: str, x: Images, positions: np.ndarray
    ) -> tuple[list[Verdict], list[Flag]]:
        self.check_images(positions, image_hashes(x))
        labels = torch.from_numpy(self.samples.labels[positions]).to(x.device)
        self.instrumented.detached = False
        found = entry.attack(
            self.instrumented.view(entry.view),
            x.clone(),
            Goal(labels),
            self.settings.threat,
            rng=RowRng(self.settings.seed, stream, self.ids(positions)),
        )
        judged = judge(self.instrumented, x, labels, found, self.settings.threat)
        flags = noticed(int(judged.refused.sum()), int(judged.broken.sum()), self.instrumented)
        return self.writer.verdicts(judged, positions, self.samples.labels[positions]), flags

    def _stream(self, stage: int) -> str:
        name = self.results.names[stage]
        return f"{name}/{self.results.names[1:stage].count(name)}"

    def ids(self, positions: np.ndarray) -> Labels:
        """Return the numbers that seed these images' random draws: of the image alone, whatever its position."""
        return sample_ids([self.results.images[position] for position in positions]).to(self.instrumented.device)

    def check_images(self, positions: np.ndarray, hashes: list[str]) -> None:
        """Raise RunError if an image's sha256 is not that of the clean pass."""
        for position, digest in zip(positions, hashes, strict=True):
            if digest != self.results.images[position]:
                raise RunError(
                    f"image {position} of {self.samples.name} has changed since this run's clean pass; "
                    "restore the data or start again in another folder."
                )

    def _halve_micro_batch(self, images: int) -> None:
        """Halve the images in one pass of the net; RunError if it is one already."""
        size = halve_micro_batch(self.instrumented, images)
        self.progress.say(f"out of memory: going on with {size} images at a time, same numbers")
