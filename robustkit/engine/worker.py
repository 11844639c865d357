"""Does an evaluation's chunks: runs the attacks, has every success judged, writes each chunk down."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch

from robustkit.checks.probe import Probe
from robustkit.checks.run import DOUBTS, UNSTEADY, diagnose
from robustkit.checks.strength import masked, scores_beat_gradients, unattacked
from robustkit.data.ahead import read_ahead
from robustkit.data.samples import Samples
from robustkit.engine.anytime import TimeUp
from robustkit.engine.flight import Boarding, Flight, Landed
from robustkit.engine.judge import Judged, image_hashes, judge, sample_ids
from robustkit.engine.lookout import Outlook, look
from robustkit.engine.meter import Meter, Way
from robustkit.engine.progress import Progress
from robustkit.engine.redraw import is_random
from robustkit.engine.sanity import refuse_answers, refuse_endless
from robustkit.engine.table import Table
from robustkit.engine.tally import Tally
from robustkit.errors import RobustkitError, RunError, UsageError
from robustkit.goal import Goal
from robustkit.isolation import own_randomness
from robustkit.ledger import Chunk, Verdict
from robustkit.record import Flag
from robustkit.registry import Rung
from robustkit.rng import RowRng
from robustkit.shapes import Images, Labels
from robustkit.threat import ThreatModel

# The most images that the checks look at.
CHECKED = 64
# The number of the chunk that holds what they found.
CHECKING = -1
# How many steps a GPU goes before the host looks at it, and how long verdicts wait to be written (seconds).
PACE = 4
WRITE_EVERY = 5.0
# Robust images are searched again in float32 where a faster search left less than this share of the clean margin.
NEAR = 0.05
# The most images that a way to run the model is tried on.
TRIAL = 16
# How many tell whether it is random.
FEW = 4
NO_MEMORY = "out of memory even with one image at a time; use a device with more memory."

Work = Callable[[Images, np.ndarray], tuple[list[Verdict], list[Flag]]]


class Sink(Protocol):
    """Where chunks go: the ledger, or the driver that has it."""

    def write(self, *chunks: Chunk) -> None:
        """Take chunks, all of them or none."""


@dataclass
class Worker:
    """Does one run's chunks.

    `free` is whether flights may choose their precision, `most` how many slots they may choose; work past the
    `deadline` (by `time.perf_counter`) ends in `TimeUp`. `lot` sets the draws of a random model apart from those
    of other workers of the same run; verdicts wait `write_every` seconds to be written.
    """

    samples: Samples
    threat: ThreatModel
    rungs: list[Rung]
    seed: int
    batch: int
    ledger: Sink
    tally: Tally
    meter: Meter
    progress: Progress
    slots: int
    free: bool
    most: int = 0
    deadline: float = math.inf
    lot: tuple[int, ...] = ()

    write_every = WRITE_EVERY

    def __post_init__(self) -> None:
        """Begin with nothing flown."""
        self.flown: dict[str, Any] = {}
        self.way: Way | None = None

    def prepare(self) -> None:
        """Try the model on one image, size the pieces to the memory, refuse an eps without limits."""
        image = self.samples.images([0])
        shape = tuple(image.shape[1:])
        refuse_endless(self.threat, shape)
        try:
            with own_randomness(self.seed, "prepare"):
                self.meter.size_up(image.to(self.meter.device), max(self.batch, self.slots, self.most))
                few = self.samples.images(range(min(FEW, len(self.samples)))).to(self.meter.device)
                self.meter.random = is_random(self.meter.model, few)
        except RobustkitError:
            raise
        except Exception as error:
            if _is_out_of_memory(error):
                raise RunError(NO_MEMORY) from error
            raise UsageError(
                f"the model cannot take images of {'x'.join(map(str, shape))} from {self.samples.name}: "
                f"{_first_line(error)}"
            ) from error

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
        self.progress.stage(self.tally.names[stage], images, self.tally.robust, self.tally.n)

    def block(self, stage: int, number: int, positions: np.ndarray, x: Images, done: int = 0) -> None:
        """Run one attack on these images as the chunk of that number, `done` images after the stage's first."""
        rung = self.rungs[stage - 1]
        budget = getattr(rung.attack, "budget", None)
        expected = budget(self.meter.num_classes, self.threat.norm) if budget else None
        stream, begun, images = self._stream(stage), self.meter.forwards, len(positions)

        def verdicts(x: Images, positions: np.ndarray) -> tuple[list[Verdict], list[Flag]]:
            return self._attack_verdicts(rung, stream, x, positions)

        def tick(forwards: int) -> None:
            share = (forwards - begun) / (expected * images) if expected else 0.0
            self.progress.advance(done + min(share, 0.99) * images, self.tally.robust)

        self.meter.on_forward = tick
        self._do(stage, number, positions, x, verdicts)
        self.meter.on_forward = lambda forwards: None

    @cached_property
    def outlook(self) -> Outlook:
        """What the model offers to climb on beside its own gradients; the meter knows of it from then on."""
        x = self.samples.images(range(min(TRIAL, len(self.samples)))).to(self.meter.device)
        try:
            found = look(self.meter.model, x, self.meter.random)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            found = look(self.meter.model, x[:1], self.meter.random)
        self.meter.views = found.views
        return found

    @property
    def doubtful(self) -> bool:
        """Whether spare attacks are called for: by a view that is not the model's own gradient, or by a flag."""
        return self.outlook.doubtful or self.suspect

    @property
    def suspect(self) -> bool:
        """Whether something speaks against gradients; that a model is an ensemble does not."""
        flags = {code for code, flag in self.tally.flags.items() if flag.raised}
        seen = self.tally.seen
        return bool(DOUBTS & flags) or self._rivalry(seen).raised or self._masked(seen).raised

    def afterthoughts(self) -> list[Flag]:
        """Return what the suite's stages and the model's views say against the number, or for it."""
        views = [rung.view for rung in self.rungs]
        idle = unattacked(views, self.outlook.views, self.tally.robust) if all(views) else None
        return [self._rivalry(self.tally.scope), self._masked(self.tally.scope), *([idle] if idle else [])]

    @property
    def _access(self) -> list[str]:
        """What the attack of each stage that is told of needs of the model."""
        access = ["", *(rung.attack.info.access for rung in self.rungs)]
        return [access[number] for number in self.tally.told]

    def _rivalry(self, among: np.ndarray) -> Flag:
        return scores_beat_gradients(self.tally.stages(among), self._access)

    def _masked(self, among: np.ndarray) -> Flag:
        views = ["", *(rung.view for rung in self.rungs)]
        told = [views[number] for number in self.tally.told]
        places = self.outlook.places if any(told) else []
        plain = any(views) and not self.outlook.doubtful
        return masked(self.tally.stages(among), self._access, told, places, plain)

    def fly(self, first: int, count: int, among: np.ndarray) -> None:
        """Take what still stands of these through `count` attacks from stage `first` on, all row-wise, at once."""
        waiting = self.tally.waiting(first, among)
        self.progress.stage(self._title(first, count), len(waiting), self.tally.robust, self.tally.n)
        if len(waiting):
            self.through(first, count, self._gate(waiting), waiting)

    def _title(self, first: int, count: int) -> str:
        names = self.tally.names[first : first + count]
        return names[0] if count == 1 else f"{names[0]} … {names[-1]}"

    def through(
        self,
        first: int,
        count: int,
        board: Callable[[int], Boarding],
        examples: np.ndarray,
        aboard: Sequence[tuple[int, Table]] = (),
    ) -> None:
        """Take those who board, and those `aboard` already, through `count` attacks from stage `first` on.

        `examples` are positions of images to choose the way to search by.
        """
        self.flown = {"claims_refused": 0, "searched_again": 0, **self.flown}
        with own_randomness(self.seed, "flight", first, *self.lot):
            try:
                self._tune(examples)
                with self.meter.searching(self.way):
                    near = self._fly(first, count, board, {}, aboard)
                if near:
                    self.flown["searched_again"] += len(near)
                    with self.meter.searching(replace(self.way or self.meter.way, dtype=None)):
                        self._fly(first, count, self._gate(np.array(sorted(near))), near)
            except (RobustkitError, TimeUp):
                raise
            except Exception as error:
                title = self._title(first, count)
                raise RunError(f"{title} failed: {type(error).__name__}: {_first_line(error)}") from error

    def _mend(self, error: Exception) -> None:
        """Halve the pieces if memory was short; else raise the error again."""
        if not _is_out_of_memory(error):
            raise error
        self._halve(self.slots)

    def _fly(
        self,
        first: int,
        count: int,
        board: Callable[[int], Boarding],
        spent: Mapping[int, np.ndarray],
        aboard: Sequence[tuple[int, Table]] = (),
    ) -> dict[int, np.ndarray]:
        """Take samples through, and write them down but for those that rounding may have saved.

        `spent` is what samples cost before, by position; returned is what those left out have cost. They are the
        robust ones that a search in low precision brought within `NEAR` of the way to the boundary; last resorts
        are left to the search after it, in float32.
        """
        flight = Flight(
            meter=self.meter,
            threat=self.threat,
            rungs=self.rungs[first - 1 : first - 1 + count],
            streams=[self._stream(stage) for stage in range(first, first + count)],
            seed=self.seed,
            slots=self.slots,
            board=board,
            mend=self._mend,
            pace=PACE if self.meter.device.type == "cuda" else 1,
            wide=bool(spent),
            steady=not (self.meter.random or UNSTEADY & self.tally.flags.keys()),
        )
        flight.take(aboard)
        number = self.tally.next_chunk(first)
        begun, landed, done = time.perf_counter(), list[Landed](), 0
        near: dict[int, np.ndarray] = {}
        self.meter.detached = False
        for group in flight.run():
            for part in group:
                for at, position in enumerate(part.position.tolist()):
                    part.spent[at] += spent.get(position, 0)
                saved = np.zeros(len(part.position), bool)
                if self.meter.rounding:
                    least = NEAR * self.tally.clean_margins[part.position]
                    saved = ~part.judged.fooled.cpu().numpy() & (part.judged.margin.cpu().numpy() < least)
                near |= dict(zip(part.position[saved].tolist(), part.spent[saved], strict=True))
                landed.append(part.select(~saved))
                done += len(part.position)
            self.progress.advance(done + flight.under_way, self.tally.robust)
            now = time.perf_counter()
            if landed and (now - begun > self.write_every or not flight.aboard or now > self.deadline):
                self._write_landed(first, count, number, landed, now - begun)
                number, begun, landed = number + 1, now, []
            self._on_time()
            self._share(flight)
        self.flown["claims_refused"] += flight.refused
        if not spent:
            self.flown |= {
                "precision": self.meter.precision,
                "layout": self.meter.layout,
                "folded": self.meter.way.net is not self.meter.model,
                "slots": flight.slots,
                "occupancy": flight.occupancy,
            }
        return near

    def _share(self, flight: Flight) -> None:
        """Give away some of those aboard if another worker has nothing to do; here there is none."""

    def _tune(self, waiting: np.ndarray) -> None:
        """Find the fastest way to search, once; other packages' attacks get the model as it is."""
        if self.way is None:
            meter = self.meter
            x = self.samples.images(waiting[: min(self.slots, TRIAL)]).to(meter.device)
            with meter.searching(meter.way), own_randomness(self.seed, "tune"):
                meter.tune(x, precision=self.free)
                self.way = meter.way
                if self.most > self.slots:
                    self.slots = meter.widest(x, self.slots, self.most)

    def _stream(self, stage: int) -> str:
        name = self.tally.names[stage]
        return f"{name}/{self.tally.names[1:stage].count(name)}"

    def _gate(self, waiting: np.ndarray) -> Callable[[int], Boarding]:
        """Return what gives the next so many of these samples; images are read in larger blocks."""
        device = self.meter.device
        blocks = read_ahead(self.samples, np.split(waiting, range(self.batch, len(waiting), self.batch)))
        block, images = np.zeros(0, np.int64), torch.zeros(0)

        def board(free: int) -> Boarding:
            nonlocal block, images
            while len(block) < free and (following := next(blocks, None)) is not None:
                more, read = following
                self._check_images(more, image_hashes(read))
                images = torch.cat([images, read]) if len(block) else read
                block = np.concatenate([block, more])
            now, block = block[:free], block[free:]
            x, images = images[:free], images[free:]
            labels = torch.from_numpy(self.samples.labels[now])
            clean = torch.from_numpy(-self.tally.clean_margins[now])
            if device.type == "cuda":
                x = x.pin_memory()
            ids = self._ids(now)
            return Boarding(now, ids, x.to(device, non_blocking=True), labels.to(device), clean.to(device))

        return board

    def _ids(self, positions: np.ndarray) -> Labels:
        """Return the numbers by which these images draw: an image's own, so that its place does not matter."""
        return sample_ids([self.tally.images[position] for position in positions]).to(self.meter.device)

    def _write_landed(self, first: int, count: int, number: int, landed: list[Landed], seconds: float) -> None:
        """Write down samples that went through a flight: each verdict with the stage that gave it."""
        spent = np.concatenate([part.spent for part in landed]).sum(0)
        units = spent.sum(1) / max(spent.sum(), 1)
        verdicts: list[list[Verdict]] = [[] for _ in range(count)]
        refused = broken = 0
        for part in landed:
            rows = self._verdicts(part.judged, part.position, part.labels)
            for stage, verdict in zip(part.stage, rows, strict=True):
                verdicts[stage].append(verdict)
            # A random model's lucky draws are its own, not the attack's fault.
            refused += 0 if self.meter.random else int(part.judged.refused.sum())
            broken += int(part.judged.broken.sum())
        flags = _noticed(refused, broken, self.meter.detached)
        chunks = [
            Chunk(
                first + stage,
                number,
                int(spent[stage, 0]),
                int(spent[stage, 1]),
                seconds * float(units[stage]),
                verdicts[stage],
                flags if stage == 0 else [],
            )
            for stage in range(count)
        ]
        self.ledger.write(*chunks)
        for chunk in chunks:
            self.tally.add(chunk)

    def _verdicts(self, judged: Judged, positions: np.ndarray, labels: np.ndarray) -> list[Verdict]:
        points = judged.x.float().cpu().numpy()
        fooled = judged.fooled.tolist()
        rows = zip(
            positions.tolist(),
            labels.tolist(),
            judged.prediction.tolist(),
            judged.margin.tolist(),
            fooled,
            [self.tally.images[position] for position in positions],
            [points[i].tobytes() if hit else None for i, hit in enumerate(fooled)],
            *self._draws(judged),
            strict=True,
        )
        return [Verdict(*row) for row in rows]

    def _draws(self, judged: Judged) -> Iterator[Sequence[float | int | None]]:
        """Yield what is told of a random model's draws; nothing of others."""
        if self.meter.random:
            yield judged.right.tolist()
            yield judged.once.int().tolist()
            yield (judged.refused | judged.fooled).int().tolist()

    def _check_images(self, positions: np.ndarray, hashes: list[str]) -> None:
        for position, digest in zip(positions, hashes, strict=True):
            if digest != self.tally.images[position]:
                raise RunError(
                    f"image {position} of {self.samples.name} has changed since this run's clean pass; "
                    "restore the data or start again in another folder."
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
        """Do one chunk and write it down. Out of memory halves the piece and does the chunk again."""
        name = self.tally.names[stage]
        x = x.to(self.meter.device)
        while True:
            forwards, backwards, begun = self.meter.forwards, self.meter.backwards, time.perf_counter()
            try:
                with own_randomness(self.seed, stage, number):
                    verdicts, flags = work(x, positions)
                break
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise self._failure(name, positions, error) from error
                self._halve(len(x))
                self.meter.forwards, self.meter.backwards = forwards, backwards
            except RobustkitError:
                raise
            except Exception as error:
                raise self._failure(name, positions, error) from error
        chunk = Chunk(
            stage,
            number,
            self.meter.forwards - forwards,
            self.meter.backwards - backwards,
            time.perf_counter() - begun,
            verdicts,
            flags,
        )
        self.ledger.write(chunk)
        self.tally.add(chunk)

    def _clean_verdicts(self, x: Images, positions: np.ndarray) -> tuple[list[Verdict], list[Flag]]:
        logits = self.meter.exact(x)
        labels = self.samples.labels[positions]
        refuse_answers(logits, labels, positions)
        y = torch.from_numpy(labels).to(x.device)
        # An exact answer to the clean image is known already, but for a random model.
        judged = judge(self.meter, x, y, x, self.threat, logits)
        rows = zip(self._verdicts(judged, positions, labels), image_hashes(x), strict=True)
        return [replace(verdict, image=image, adversarial=None, struck=None) for verdict, image in rows], []

    def _check(self, x: Images, positions: np.ndarray) -> tuple[list[Verdict], list[Flag]]:
        labels = torch.from_numpy(self.samples.labels[positions]).to(x.device)
        plain = Meter(self.meter.model, self.meter.device)
        plain.piece = self.meter.piece
        attacks = [rung.attack for rung in self.rungs if not rung.view]
        flags = diagnose(Probe(plain, x, labels, self.threat, attacks, self.seed, plain.model))
        self.meter.forwards += plain.forwards
        self.meter.backwards += plain.backwards
        return [], flags

    def _attack_verdicts(
        self, rung: Rung, stream: str, x: Images, positions: np.ndarray
    ) -> tuple[list[Verdict], list[Flag]]:
        self._check_images(positions, image_hashes(x))
        labels = torch.from_numpy(self.samples.labels[positions]).to(x.device)
        self.meter.detached = False
        found = rung.attack(
            self.meter.through(rung.view),
            x.clone(),
            Goal(labels),
            self.threat,
            rng=RowRng(self.seed, stream, self._ids(positions)),
        )
        judged = judge(self.meter, x, labels, found, self.threat)
        flags = _noticed(int(judged.refused.sum()), int(judged.broken.sum()), self.meter.detached)
        return self._verdicts(judged, positions, self.samples.labels[positions]), flags

    def _halve(self, images: int) -> None:
        piece = min(self.meter.piece or images, images)
        if piece == 1:
            raise RunError(NO_MEMORY)
        self.meter.piece = piece // 2
        if self.meter.device.type == "cuda":
            torch.cuda.empty_cache()
        self.progress.say(f"out of memory: going on with {piece // 2} images at a time, same numbers")

    def _failure(self, name: str, positions: np.ndarray, error: Exception) -> RunError:
        return RunError(
            f"{name} failed on images {positions[0]} to {positions[-1]}: "
            f"{type(error).__name__}: {_first_line(error)}"
        )


def _noticed(refused: int, broken: int, detached: bool) -> list[Flag]:
    """Return what was noticed while a chunk was judged: counts of images, and a missing gradient."""
    flags = []
    if refused:
        flags.append(
            Flag(
                "claims-refused",
                "info",
                refused,
                "points fooled the model only outside the ball or the [0, 1] box; they do not count",
                "nothing to do, unless there are many: then the attack does not keep to the threat",
            )
        )
    if broken:
        flags.append(
            Flag(
                "non-finite",
                "warning",
                broken,
                "attacked images gave NaN or infinite logits; they do not count as fooled",
                "find out why the model breaks there: an attacker could use it",
            )
        )
    if detached:
        flags.append(
            Flag(
                "no-gradient",
                "warning",
                None,
                "the model's output does not depend on its input differentiably: gradient attacks see zero",
                "judge by score-based attacks, or give a differentiable version of the model",
            )
        )
    return flags


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
