"""Does chunks batch by batch: the clean pass, the checks, and attacks that take a whole batch through at once."""

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
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images, Labels
from robustkit.core.threat import ThreatModel
from robustkit.data.prefetch import read_ahead
from robustkit.data.samples import Samples
from robustkit.engine.evaluation.early_stopping import TimeUp
from robustkit.engine.evaluation.ledger_writer import LedgerWriter, Sink, noticed
from robustkit.engine.evaluation.minimum_norm import Nearest, search
from robustkit.engine.evaluation.results import CHECKING, RunResults
from robustkit.engine.evaluation.sanity import refuse_answers
from robustkit.engine.evaluation.verdicts import image_hashes, judge, sample_ids
from robustkit.engine.failures import NO_MEMORY, described, is_out_of_memory
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.engine.progress import Progress
from robustkit.registry import SuiteEntry
from robustkit.runs.ledger import Chunk, Verdict
from robustkit.runs.recorded_outputs import recording
from robustkit.runs.unfinished_work import Store

# The most images that the checks look at.
CHECKED = 64

T = TypeVar("T")
Work = Callable[[Images, np.ndarray], tuple[list[Verdict], list[Flag]]]


@dataclass
class BatchRunner:
    """Does one run's chunks, as far as they are batches.

    Work past the `deadline` (by `time.perf_counter`) ends in `TimeUp`. The `store` keeps unfinished work, from
    which a killed run continues.
    """

    samples: Samples
    threat: ThreatModel
    entries: list[SuiteEntry]
    seed: int
    batch: int
    ledger: Sink
    results: RunResults
    instrumented: InstrumentedModel
    progress: Progress
    deadline: float = field(default=math.inf, kw_only=True)
    store: Store = field(default=Store(None), kw_only=True)

    def __post_init__(self) -> None:
        """Have somebody who writes."""
        self.writer = LedgerWriter(self.ledger, self.results, self.instrumented)

    def clean(self, among: np.ndarray) -> None:
        """Settle those of these images that the model gets wrong as they are; run the checks if none has yet."""
        results = self.results
        self.progress.stage("clean", len(among), results.robust, results.n)
        for number, positions, x in self._pending(0, among):
            self._do(0, number, positions, x, self._clean_verdicts)
        if (0, CHECKING) not in results.chunks:
            first = np.arange(min(self.batch, CHECKED))
            self._do(0, CHECKING, first, self.samples.images(first), self._check)

    def attack(self, stage: int, among: np.ndarray) -> None:
        """Run one attack over what still stands of these."""
        self._announce(stage, among)
        done = 0
        for number, positions, x in self._pending(stage, among):
            self.block(stage, number, positions, x, done)
            done += len(positions)

    def _announce(self, stage: int, among: np.ndarray) -> None:
        images = len(self.results.waiting(stage, among))
        name = "minimum norms" if self.threat.minimal else self.results.names[stage]
        self.progress.stage(name, images, self.results.robust, self.results.n)

    def block(self, stage: int, number: int, positions: np.ndarray, x: Images, done: int = 0) -> None:
        """Run one attack on these images as the chunk of that number, `done` images after the stage's first.

        Where the threat is minimal all attacks run, since each begins from the points that those before it found.
        """
        entry = self.entries[stage - 1]
        budgets = [
            getattr(one.attack, "budget", None) for one in (self.entries if self.threat.minimal else [entry])
        ]
        expected = sum(
            budget(self.instrumented.num_classes, self.threat.norm) if budget else 0 for budget in budgets
        )
        stream, begun, images = self._stream(stage), self.instrumented.forwards, len(positions)

        def verdicts(x: Images, positions: np.ndarray) -> tuple[list[Verdict], list[Flag]]:
            return self._attack_verdicts(entry, stream, x, positions)

        def tick(forwards: int) -> None:
            share = (forwards - begun) / (expected * images) if expected else 0.0
            self.progress.advance(done + min(share, 0.99) * images, self.results.robust)

        self.instrumented.on_forward = tick
        if self.threat.minimal:
            self._search(number, positions, x)
        else:
            self._do(stage, number, positions, x, verdicts)
        self.instrumented.on_forward = lambda forwards: None

    def _search(self, number: int, positions: np.ndarray, x: Images) -> None:
        """Look for the nearest points by all attacks; write one chunk of this number for each attack."""
        labels = torch.from_numpy(self.samples.labels[positions]).to(self.instrumented.device)

        def work(x: Images, positions: np.ndarray) -> Nearest:
            self.check_images(positions, image_hashes(x))
            self.instrumented.detached = False
            ids = self.ids(positions)
            return search(self.instrumented, self.entries, x, labels, self.threat, seed=self.seed, ids=ids)

        with self._done(1, number, positions, x, work) as (found, seconds):
            rows = self.writer.verdicts(found.judged, positions, self.samples.labels[positions])
            far, by = found.distance.tolist(), (found.attack % len(self.entries)).cpu().numpy()
            rows = [replace(row, distance=d) if row.fooled else row for row, d in zip(rows, far, strict=True)]
            flags = noticed(0, int(found.judged.broken.sum()), self.instrumented)
            total = max(sum(map(sum, found.spent)), 1)
            self.writer.write(
                *(
                    Chunk(
                        stage,
                        number,
                        *spent,
                        seconds * sum(spent) / total,
                        [rows[at] for at in np.flatnonzero(by == stage - 1)],
                        flags if stage == 1 else [],
                    )
                    for stage, spent in enumerate(found.spent, 1)
                )
            )

    def _parts(self, stage: int, among: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """Return number and positions of the chunks that a stage has still to do.

        They are cut from all that enter the stage, whatever is done already: an attack whose random numbers depend
        on the batch gets the same batches in whatever order they are done, and after any resume.
        """
        entering = among[self.results.fell[among] >= stage]
        taken = {chunk for of, chunk in self.results.chunks if of == stage}
        free, parts = self.results.next_chunk(stage), []
        for index, begin in enumerate(range(0, len(entering), self.batch)):
            left = self.results.waiting(stage, entering[begin : begin + self.batch])
            if len(left):
                number = free if index in taken else index
                taken.add(number)
                free = max(free, number + 1)
                parts.append((number, left))
        return parts

    def _pending(self, stage: int, among: np.ndarray) -> Iterator[tuple[int, np.ndarray, Images]]:
        """Yield number, positions and images of the stage's chunks one by one."""
        done, parts = 0, self._parts(stage, among)
        blocks = read_ahead(self.samples, [part for _, part in parts])
        for (number, _), (part, x) in zip(parts, blocks, strict=True):
            self._on_time()
            yield number, part, x
            done += len(part)
            self.progress.advance(done, self.results.robust)

    def _on_time(self) -> None:
        if time.perf_counter() > self.deadline:
            raise TimeUp

    def _do(
        self,
        stage: int,
        number: int,
        positions: np.ndarray,
        x: Images,
        work: Work,
    ) -> None:
        """Do one chunk and write it down."""
        forwards, backwards = self.instrumented.forwards, self.instrumented.backwards
        with self._done(stage, number, positions, x, work) as ((verdicts, flags), seconds):
            spent = self.instrumented.forwards - forwards, self.instrumented.backwards - backwards
            self.writer.write(Chunk(stage, number, *spent, seconds, verdicts, flags))

    @contextmanager
    def _done(
        self, stage: int, number: int, positions: np.ndarray, x: Images, work: Callable[[Images, np.ndarray], T]
    ) -> Iterator[tuple[T, float]]:
        """Do the work of a chunk, which is written down inside, and then forget how it went.

        Out of memory halves the piece and does the work again.
        """
        name = self.results.names[stage]
        x = x.to(self.instrumented.device)
        while True:
            forwards, backwards = self.instrumented.forwards, self.instrumented.backwards
            try:
                with (
                    own_randomness(self.seed, stage, number),
                    recording(self.store, f"chunk-{stage}-{number}") as answers,
                ):
                    found = work(x, positions)
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise self._failure(name, positions, error) from error
                answers.restart()
                self._halve(len(x))
                self.instrumented.forwards, self.instrumented.backwards = forwards, backwards
            except RobustkitError:
                raise
            except Exception as error:
                raise self._failure(name, positions, error) from error
        yield found, answers.seconds
        answers.restart()

    def _clean_verdicts(self, x: Images, positions: np.ndarray) -> tuple[list[Verdict], list[Flag]]:
        logits = self.instrumented.logits_fp32(x)
        labels = self.samples.labels[positions]
        refuse_answers(logits, labels, positions)
        y = torch.from_numpy(labels).to(x.device)
        # An exact answer to the clean image is known already, but for a random model.
        judged = judge(self.instrumented, x, y, x, self.threat, logits, chosen=False)
        rows = zip(self.writer.verdicts(judged, positions, labels), image_hashes(x), strict=True)
        return [replace(verdict, image=image, adversarial=None, struck=None) for verdict, image in rows], []

    def _check(self, x: Images, positions: np.ndarray) -> tuple[list[Verdict], list[Flag]]:
        labels = torch.from_numpy(self.samples.labels[positions]).to(x.device)
        threat = self.threat.typical() if self.threat.minimal else self.threat
        plain = InstrumentedModel(self.instrumented.model, self.instrumented.device)
        for name in ("micro_batch", "slow_batch", "differentiable", "backward_error"):
            setattr(plain, name, getattr(self.instrumented, name))
        attacks = [entry.attack for entry in self.entries if not entry.view]
        # Points can be planted only where gradients can be had.
        net = None if plain.backward_error else plain.model
        flags = diagnose(Probe(plain, x, labels, threat, attacks, self.seed, net))
        self.instrumented.forwards += plain.forwards
        self.instrumented.backwards += plain.backwards
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
            self.threat,
            rng=RowRng(self.seed, stream, self.ids(positions)),
        )
        judged = judge(self.instrumented, x, labels, found, self.threat)
        flags = noticed(int(judged.refused.sum()), int(judged.broken.sum()), self.instrumented)
        return self.writer.verdicts(judged, positions, self.samples.labels[positions]), flags

    def _stream(self, stage: int) -> str:
        name = self.results.names[stage]
        return f"{name}/{self.results.names[1:stage].count(name)}"

    def ids(self, positions: np.ndarray) -> Labels:
        """Return the numbers by which these images draw: an image's own, so that its place does not matter."""
        return sample_ids([self.results.images[position] for position in positions]).to(self.instrumented.device)

    def check_images(self, positions: np.ndarray, hashes: list[str]) -> None:
        """Raise RunError if an image's sha256 is not that of the clean pass."""
        for position, digest in zip(positions, hashes, strict=True):
            if digest != self.results.images[position]:
                raise RunError(
                    f"image {position} of {self.samples.name} has changed since this run's clean pass; "
                    "restore the data or start again in another folder."
                )

    def _halve(self, images: int) -> None:
        piece = min(self.instrumented.micro_batch or images, images)
        if piece == 1:
            raise RunError(NO_MEMORY)
        self.instrumented.micro_batch = piece // 2
        if self.instrumented.device.type == "cuda":
            torch.cuda.empty_cache()
        self.progress.say(f"out of memory: going on with {piece // 2} images at a time, same numbers")

    def _failure(self, name: str, positions: np.ndarray, error: Exception) -> RunError:
        return RunError(f"{name} failed on images {positions[0]} to {positions[-1]} with {described(error)}.")
