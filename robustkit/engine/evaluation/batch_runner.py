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
from robustkit.runs.recorded_answers import recording
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
    rungs: list[SuiteEntry]
    seed: int
    batch: int
    ledger: Sink
    tally: RunResults
    meter: InstrumentedModel
    progress: Progress
    deadline: float = field(default=math.inf, kw_only=True)
    store: Store = field(default=Store(None), kw_only=True)

    def __post_init__(self) -> None:
        """Have somebody who writes."""
        self.scribe = LedgerWriter(self.ledger, self.tally, self.meter)

    def clean(self, among: np.ndarray) -> None:
        """Settle those of these images that the model gets wrong as they are; run the checks if none has yet."""
        tally = self.tally
        self.progress.stage("clean", len(among), tally.robust, tally.n)
        for number, positions, x in self._pending(0, among):
            self._do(0, number, positions, x, self._clean_verdicts)
        if (0, CHECKING) not in tally.chunks:
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
        images = len(self.tally.waiting(stage, among))
        name = "minimum norms" if self.threat.minimal else self.tally.names[stage]
        self.progress.stage(name, images, self.tally.robust, self.tally.n)

    def block(self, stage: int, number: int, positions: np.ndarray, x: Images, done: int = 0) -> None:
        """Run one attack on these images as the chunk of that number, `done` images after the stage's first.

        Where the threat is minimal all attacks run, since each begins from the points that those before it found.
        """
        rung = self.rungs[stage - 1]
        budgets = [getattr(one.attack, "budget", None) for one in (self.rungs if self.threat.minimal else [rung])]
        expected = sum(budget(self.meter.num_classes, self.threat.norm) if budget else 0 for budget in budgets)
        stream, begun, images = self._stream(stage), self.meter.forwards, len(positions)

        def verdicts(x: Images, positions: np.ndarray) -> tuple[list[Verdict], list[Flag]]:
            return self._attack_verdicts(rung, stream, x, positions)

        def tick(forwards: int) -> None:
            share = (forwards - begun) / (expected * images) if expected else 0.0
            self.progress.advance(done + min(share, 0.99) * images, self.tally.robust)

        self.meter.on_forward = tick
        if self.threat.minimal:
            self._search(number, positions, x)
        else:
            self._do(stage, number, positions, x, verdicts)
        self.meter.on_forward = lambda forwards: None

    def _search(self, number: int, positions: np.ndarray, x: Images) -> None:
        """Look for the nearest points by all attacks; write one chunk of this number for each attack."""
        labels = torch.from_numpy(self.samples.labels[positions]).to(self.meter.device)

        def work(x: Images, positions: np.ndarray) -> Nearest:
            self.check_images(positions, image_hashes(x))
            self.meter.detached = False
            ids = self.ids(positions)
            return search(self.meter, self.rungs, x, labels, self.threat, seed=self.seed, ids=ids)

        with self._done(1, number, positions, x, work) as (found, seconds):
            rows = self.scribe.verdicts(found.judged, positions, self.samples.labels[positions])
            far, by = found.distance.tolist(), (found.attack % len(self.rungs)).cpu().numpy()
            rows = [replace(row, distance=d) if row.fooled else row for row, d in zip(rows, far, strict=True)]
            flags = noticed(0, int(found.judged.broken.sum()), self.meter)
            total = max(sum(map(sum, found.spent)), 1)
            self.scribe.write(
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
        entering = among[self.tally.fell[among] >= stage]
        taken = {chunk for of, chunk in self.tally.chunks if of == stage}
        free, parts = self.tally.next_chunk(stage), []
        for index, begin in enumerate(range(0, len(entering), self.batch)):
            left = self.tally.waiting(stage, entering[begin : begin + self.batch])
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
            self.progress.advance(done, self.tally.robust)

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
        forwards, backwards = self.meter.forwards, self.meter.backwards
        with self._done(stage, number, positions, x, work) as ((verdicts, flags), seconds):
            spent = self.meter.forwards - forwards, self.meter.backwards - backwards
            self.scribe.write(Chunk(stage, number, *spent, seconds, verdicts, flags))

    @contextmanager
    def _done(
        self, stage: int, number: int, positions: np.ndarray, x: Images, work: Callable[[Images, np.ndarray], T]
    ) -> Iterator[tuple[T, float]]:
        """Do the work of a chunk, which is written down inside, and then forget how it went.

        Out of memory halves the piece and does the work again.
        """
        name = self.tally.names[stage]
        x = x.to(self.meter.device)
        while True:
            forwards, backwards = self.meter.forwards, self.meter.backwards
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
                self.meter.forwards, self.meter.backwards = forwards, backwards
            except RobustkitError:
                raise
            except Exception as error:
                raise self._failure(name, positions, error) from error
        yield found, answers.seconds
        answers.restart()

    def _clean_verdicts(self, x: Images, positions: np.ndarray) -> tuple[list[Verdict], list[Flag]]:
        logits = self.meter.exact(x)
        labels = self.samples.labels[positions]
        refuse_answers(logits, labels, positions)
        y = torch.from_numpy(labels).to(x.device)
        # An exact answer to the clean image is known already, but for a random model.
        judged = judge(self.meter, x, y, x, self.threat, logits, chosen=False)
        rows = zip(self.scribe.verdicts(judged, positions, labels), image_hashes(x), strict=True)
        return [replace(verdict, image=image, adversarial=None, struck=None) for verdict, image in rows], []

    def _check(self, x: Images, positions: np.ndarray) -> tuple[list[Verdict], list[Flag]]:
        labels = torch.from_numpy(self.samples.labels[positions]).to(x.device)
        threat = self.threat.typical() if self.threat.minimal else self.threat
        plain = InstrumentedModel(self.meter.model, self.meter.device)
        for name in ("piece", "quick", "differentiable", "backward_error"):
            setattr(plain, name, getattr(self.meter, name))
        attacks = [rung.attack for rung in self.rungs if not rung.view]
        # Points can be planted only where gradients can be had.
        net = None if plain.backward_error else plain.model
        flags = diagnose(Probe(plain, x, labels, threat, attacks, self.seed, net))
        self.meter.forwards += plain.forwards
        self.meter.backwards += plain.backwards
        return [], flags

    def _attack_verdicts(
        self, rung: SuiteEntry, stream: str, x: Images, positions: np.ndarray
    ) -> tuple[list[Verdict], list[Flag]]:
        self.check_images(positions, image_hashes(x))
        labels = torch.from_numpy(self.samples.labels[positions]).to(x.device)
        self.meter.detached = False
        found = rung.attack(
            self.meter.through(rung.view),
            x.clone(),
            Goal(labels),
            self.threat,
            rng=RowRng(self.seed, stream, self.ids(positions)),
        )
        judged = judge(self.meter, x, labels, found, self.threat)
        flags = noticed(int(judged.refused.sum()), int(judged.broken.sum()), self.meter)
        return self.scribe.verdicts(judged, positions, self.samples.labels[positions]), flags

    def _stream(self, stage: int) -> str:
        name = self.tally.names[stage]
        return f"{name}/{self.tally.names[1:stage].count(name)}"

    def ids(self, positions: np.ndarray) -> Labels:
        """Return the numbers by which these images draw: an image's own, so that its place does not matter."""
        return sample_ids([self.tally.images[position] for position in positions]).to(self.meter.device)

    def check_images(self, positions: np.ndarray, hashes: list[str]) -> None:
        """Raise RunError if an image's sha256 is not that of the clean pass."""
        for position, digest in zip(positions, hashes, strict=True):
            if digest != self.tally.images[position]:
                raise RunError(
                    f"image {position} of {self.samples.name} has changed since this run's clean pass; "
                    "restore the data or start again in another folder."
                )

    def _halve(self, images: int) -> None:
        piece = min(self.meter.piece or images, images)
        if piece == 1:
            raise RunError(NO_MEMORY)
        self.meter.piece = piece // 2
        if self.meter.device.type == "cuda":
            torch.cuda.empty_cache()
        self.progress.say(f"out of memory: going on with {piece // 2} images at a time, same numbers")

    def _failure(self, name: str, positions: np.ndarray, error: Exception) -> RunError:
        return RunError(f"{name} failed on images {positions[0]} to {positions[-1]} with {described(error)}.")
