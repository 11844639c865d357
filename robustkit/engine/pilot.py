"""The beginning of an evaluation, watched: how fast the model is, and what images drawn at random take.

It is the evaluation's own work on a few of its images, in their real order of attacks; what comes out is costs.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from robustkit.engine.anytime import shuffled
from robustkit.engine.evaluate import MOST_SLOTS, Evaluation
from robustkit.engine.flight import Boarding, Landed
from robustkit.engine.meter import Meter
from robustkit.engine.progress import Progress
from robustkit.engine.tally import STANDS, Tally
from robustkit.engine.worker import TRIAL, Work, Worker
from robustkit.errors import RobustkitError, UsageError
from robustkit.isolation import evaluation_mode, own_randomness, threads
from robustkit.ledger import Ledger
from robustkit.registry import Rung
from robustkit.rows import RowWise
from robustkit.shapes import Images

# The first images are as many as a quarter of the time is enough for, at so many passes each, within these ends.
TYPICAL = 100
FEWEST, FIRST = 2, 64
# A batch that takes more than this share of the time is the largest that is timed.
LONGEST = 0.1
# No less than this share of the model's own time is believed of an image's propagations.
LEAST_DRAG = 0.5
# Attacks that ask for a backward pass for each class.
JACOBIANS = ("autoattack:fab",)


class Over(RobustkitError):
    """The time for the pilot is up, in the middle of an attack."""


@dataclass(frozen=True)
class Speed:
    """Seconds that an image takes where `at_once` are in a pass, and of them what any pass takes (`fixed`)."""

    forward: float
    both: float
    fixed: float
    at_once: int

    @property
    def marginal(self) -> tuple[float, float]:
        """Seconds of one more image in a pass, forward and backward."""
        each = max(self.both - self.fixed / self.at_once, 0.0)
        share = min(self.forward / self.both, 1.0) if self.both else 0.0
        return each * share, each * (1 - share)


@dataclass(frozen=True)
class Findings:
    """What a pilot found on the images at `positions`.

    Attributes:
        positions: drawn at random, in the order taken.
        forwards: of each image's attacks, 0 for those that the model gets wrong as they are.
        backwards: likewise.
        passes: of each, from boarding to its verdict; they follow one another.
        through: which have their verdict; of the others the costs are not known.
        robust: how many of these withstood everything.
        stray: forwards and backwards of those that are not through.
        most: forwards, backwards and passes of an image that withstands everything for as long as the attacks
            may last; None where one of them does not say.
        speed: of the model, as the attacks search.
        seconds: of the attacks.
        overhead: seconds that a pass takes whatever is in it, and all that goes on around it.
        drag: how many times the seconds of the model alone an image's propagations take.
        start: seconds to size up the model and to choose how to run it.
        checks: seconds of the checks.
        clean: seconds of the clean pass for each image.
        read: seconds to read an image, which are part of it.
        image_bytes: of an image in float32.
        slots: how many images a pass of the whole run takes.
        held: bytes of memory before.
        peak: bytes at the most.
        meter: as it was at the end.
    """

    positions: np.ndarray
    forwards: np.ndarray
    backwards: np.ndarray
    passes: np.ndarray
    through: np.ndarray
    robust: int
    stray: tuple[int, int]
    most: tuple[int, int, int] | None
    speed: Speed
    seconds: float
    overhead: float
    drag: float
    start: float
    checks: float
    clean: float
    read: float
    image_bytes: int
    slots: int
    held: int
    peak: int
    meter: Meter


class Counting(Meter):
    """A meter that counts passes as well: `calls`."""

    calls = 0

    @property
    def counts(self) -> np.ndarray:
        """Forwards, backwards and passes so far."""
        return np.array([self.forwards, self.backwards, self.calls])

    def _in_pieces(self, x: Images, differentiable: bool, net: Callable[[Images], torch.Tensor]) -> torch.Tensor:
        self.calls += 1 if self.piece is None else math.ceil(len(x) / self.piece)
        return super()._in_pieces(x, differentiable, net)

    def speed(self, x: Images, most: int, limit: float) -> Speed:
        """Return the model's speed, by batches of x that double up to `most` while half of `limit` is enough.

        None of it is counted.
        """
        found: list[tuple[int, float, float]] = []
        size, calls = 1, self.calls
        self._both(x[:1])
        while True:
            batch = x.repeat(-(-size // len(x)), 1, 1, 1)[:size]
            try:
                times = [(self._forward(batch), self._both(batch)) for _ in range(1 if found else 3)]
            except (RuntimeError, MemoryError):
                if not found:
                    raise
                break
            forward, both = (min(column) for column in zip(*times, strict=True))
            found.append((size, forward, both))
            if size == most or 2 * both > limit:
                break
            size = min(2 * size, most)
        self.calls = calls
        (_, _, alone), (size, forward, both) = found[0], found[-1]
        fixed = max(0.0, (size * alone - both) / (size - 1)) if size > 1 else 0.0
        return Speed(forward / size, both / size, min(fixed, both), size)

    def _forward(self, x: Images) -> float:
        begun = time.perf_counter()
        with torch.no_grad():
            self._in_pieces(x, False, self._net)
        return self._since(begun)

    def _both(self, x: Images) -> float:
        begun = time.perf_counter()
        images = x.detach().requires_grad_()
        logits = self._in_pieces(images, True, self._net)
        if logits.requires_grad:
            torch.autograd.grad(logits.sum(), images)
        return self._since(begun)

    def _since(self, begun: float) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - begun


class Memory:
    """How much memory is in use, and was at the most: of the device, or of the process on a CPU."""

    def __init__(self, device: torch.device) -> None:
        """Begin to watch."""
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.before = _most_resident()
        self.held = self.seen = self.now()

    def now(self) -> int:
        """Return the bytes in use."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
        except (OSError, IndexError, ValueError):
            return _most_resident()
        return pages * os.sysconf("SC_PAGE_SIZE")

    def look(self) -> None:
        """Take note of what is in use."""
        self.seen = max(self.seen, self.now())

    @property
    def peak(self) -> int:
        """The most bytes in use at once."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        # The process's own high-water mark tells of the pilot only where the pilot has raised it.
        after = _most_resident()
        return max(self.seen, after if after > self.before else 0)


def _most_resident() -> int:
    """Return the most bytes that the process has had in memory; 0 where the system does not say."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Watch(Progress):
    """Ends the attacks when their time is over; notes seconds, passes and propagations, and memory, on the way."""

    def __init__(self, memory: Memory, clock: Callable[[], float], meter: Counting, listener: Progress) -> None:
        """Begin with attacks without an end; `listener` hears the news."""
        self.memory, self.clock, self.meter, self.end = memory, clock, meter, math.inf
        self.listener = listener
        self.steps: list[np.ndarray] = []
        self.rest()

    def say(self, text: str) -> None:  # noqa: D102
        self.listener.say(text)

    def rest(self) -> None:
        """Leave out what has been since the last look."""
        self.last: np.ndarray = np.array([self.clock(), *self.meter.counts])

    def advance(self, done: float, robust: int) -> None:  # noqa: D102
        self.memory.look()
        now = np.array([self.clock(), *self.meter.counts])
        if self.end < math.inf:
            self.steps.append(now - self.last)
        self.last = now
        if now[0] > self.end:
            raise Over("the pilot's time is over.")

    def fit(self, speed: Speed, seconds: float) -> tuple[float, float]:
        """Return what passes take besides their images, and images in terms of the model's own seconds.

        By least squares over the steps, neither negative and the images not below half of what the model alone
        took; scaled so that they add up to all the `seconds`.
        """
        steps = np.array(self.steps).reshape(-1, 4)
        took, calls = steps[:, 0], steps[:, 3]
        forward, backward = speed.marginal
        work = steps[:, 1] * forward + steps[:, 2] * backward
        across = calls @ work
        det = (calls @ calls) * (work @ work) - across**2
        drag = ((calls @ calls) * (work @ took) - across * (calls @ took)) / det if det > 0 else 1.0
        drag = max(drag, LEAST_DRAG)
        overhead = max((took.sum() - drag * work.sum()) / calls.sum(), 0.0) if calls.sum() else 0.0
        whole = overhead * calls.sum() + drag * work.sum()
        scale = seconds / whole if whole else 1.0
        return float(overhead * scale), float(drag * scale)


class Scout(Worker):
    """A worker that notes what each image costs it."""

    meter: Counting
    progress: Watch
    write_every = 0.0

    def note(self, end: float) -> None:
        """Begin to take notes; attacks go on until the clock says `end`."""
        n = len(self.samples)
        self.end = end
        self.forwards, self.backwards, self.passes = (np.zeros(n, np.int64) for _ in range(3))
        self.boarded: dict[int, int] = {}
        self.reached = 0
        self.cleaning = self.checking = 0.0
        self.aside = np.zeros(3, np.int64)

    @property
    def counts(self) -> np.ndarray:
        """Forwards, backwards and passes of the attacks so far."""
        return self.meter.counts - self.aside

    def clean(self, among: np.ndarray) -> None:
        """Do the clean pass, whatever the clock says, and keep its costs apart."""
        begun, before = self.progress.clock(), self.meter.counts
        self.progress.end = math.inf
        super().clean(among)
        self.cleaning += self.progress.clock() - begun
        self.aside += self.meter.counts - before
        # What the clean pass took is not taken from the attacks.
        self.end += self.progress.clock() - begun
        self.progress.end = self.end
        self.progress.rest()

    def _do(self, stage: int, number: int, positions: np.ndarray, work: Work) -> None:
        begun = self.progress.clock()
        super()._do(stage, number, positions, work)
        if work == self._check:
            self.checking += self.progress.clock() - begun

    def through(
        self,
        first: int,
        count: int,
        board: Callable[[int], Boarding],
        examples: np.ndarray,
        aboard: object = (),
    ) -> None:
        """Take those who board through `count` attacks from stage `first` on."""
        self.reached = max(self.reached, first + count - 1)
        self.boarded = {}
        super().through(first, count, board, examples)

    def _gate(self, waiting: np.ndarray) -> Callable[[int], Boarding]:
        board = super()._gate(waiting)

        def noted(free: int) -> Boarding:
            boarding = board(free)
            for position in boarding.position.tolist():
                self.boarded.setdefault(position, self.meter.calls)
            return boarding

        return noted

    def _write_landed(self, first: int, count: int, number: int, landed: list[Landed], seconds: float) -> None:
        super()._write_landed(first, count, number, landed, seconds)
        for part in landed:
            forwards, backwards = part.spent.sum(1).T
            self.forwards[part.position] += forwards
            self.backwards[part.position] += backwards
            self.passes[part.position] += [self.meter.calls - self.boarded[at] for at in part.position.tolist()]

    def block(self, stage: int, number: int, positions: np.ndarray, done: int = 0) -> None:
        """Run one attack on these; each image's costs are taken to be the same."""
        self.reached = max(self.reached, stage)
        before = self.meter.counts
        super().block(stage, number, positions, done)
        forwards, backwards, calls = self.meter.counts - before
        self.forwards[positions] += round(forwards / len(positions))
        self.backwards[positions] += round(backwards / len(positions))
        self.passes[positions] += calls


@dataclass(frozen=True)
class Pilot(Evaluation):
    """An evaluation of which only the beginning is done: attacks for about so many `seconds`."""

    budget: float = 10.0
    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        super().__post_init__()
        if not 0 < self.budget < math.inf:
            raise UsageError(f"seconds {self.budget:g}: write how long to measure, a positive number such as 10.")

    def look(self, progress: Progress | None = None) -> Findings:
        """Return what the first images take; `progress` is told the news.

        Raises:
            UsageError: as an evaluation would.
            RunError: likewise.
        """
        memory = Memory(self.device)
        tally = Tally.of(len(self.samples), [rung.spec for rung in self.rungs])
        with Ledger.open(None, "plan") as ledger, evaluation_mode(self.model):
            meter = Counting(self.model, self.device, self._precision)
            watch = Watch(memory, self.clock, meter, progress or Progress())
            scout = Scout(
                self.samples,
                self.threat,
                self.rungs,
                self.seed,
                self.batch,
                ledger,
                tally,
                meter,
                watch,
                self.slots,
                self.precision == "auto",
                MOST_SLOTS if self.batch_size is None and self.device.type == "cuda" else self.slots,
            )
            begun = self.clock()
            scout.prepare()
            with threads(meter.threads):
                order = shuffled(len(self.samples), self.seed)
                reading = time.perf_counter()
                x = self.samples.images(order[:TRIAL])
                read = (time.perf_counter() - reading) / len(x)
                flies = any(isinstance(rung.attack, RowWise) for rung in self.rungs)
                if flies:
                    scout._tune(order[:TRIAL])
                start = self.clock() - begun
                most = scout.slots if flies else self.batch
                with meter.searching(scout.way or meter.way), own_randomness(self.seed, "speed"):
                    speed = meter.speed(x.to(self.device), most, LONGEST * self.budget)
                memory.look()
                begun = self.clock()
                scout.note(begun + self.budget)
                watch.rest()
                self._go(scout, order, speed)
                seconds = self.clock() - begun - scout.cleaning
        return self._found(scout, start, speed, seconds, read, memory)

    def _go(self, scout: Scout, order: np.ndarray, speed: Speed) -> None:
        """Take block after block through the suite until the time is over."""
        tally, begun, taken = scout.tally, self.clock(), 0
        size = int(0.25 * self.budget / max(TYPICAL * speed.both, 1e-9))
        size = min(max(size, FEWEST), FIRST)
        tally.scope = order[:0]
        while size and taken < len(order):
            block = order[taken : taken + size]
            taken += len(block)
            tally.scope = order[:taken]
            try:
                self._block(scout, block)
            except Over:
                return
            spent = self.clock() - begun - scout.cleaning
            left = self.budget - spent
            size = min(taken, int(0.8 * left * taken / max(spent, 1e-9))) if left > 0 else 0

    def _found(
        self, scout: Scout, start: float, speed: Speed, seconds: float, read: float, memory: Memory
    ) -> Findings:
        tally, positions = scout.tally, scout.tally.scope
        sure = [number for number, rung in enumerate(self.rungs, 1) if not rung.spare]
        last = max([*sure, scout.reached])
        stood = tally.fell[positions] == STANDS
        through = ~stood | (tally.judged[positions] >= last)
        costs = [counts[positions] for counts in (scout.forwards, scout.backwards, scout.passes)]
        forwards, backwards, passes = (np.where(through, cost, 0) for cost in costs)
        spent, (overhead, drag) = scout.counts, scout.progress.fit(speed, seconds)
        meant = [rung for number, rung in enumerate(self.rungs, 1) if not rung.spare or number <= scout.reached]
        return Findings(
            positions=positions,
            forwards=forwards,
            backwards=backwards,
            passes=passes,
            through=through,
            robust=int((stood & through).sum()),
            stray=(int(max(spent[0] - forwards.sum(), 0)), int(max(spent[1] - backwards.sum(), 0))),
            most=most_of(meant, scout.meter, self.threat.norm),
            speed=speed,
            seconds=seconds,
            overhead=overhead,
            drag=drag,
            start=start,
            checks=scout.checking,
            clean=max(scout.cleaning - scout.checking, 0.0) / len(positions),
            read=read,
            image_bytes=self.samples.images([0]).nbytes,
            slots=scout.slots,
            held=memory.held,
            peak=memory.peak,
            meter=scout.meter,
        )


def most_of(rungs: list[Rung], meter: Meter, norm: str) -> tuple[int, int, int] | None:
    """Return the most forwards, backwards and successive passes that an image may take; None if one is unknown."""
    classes = meter.num_classes or 2
    total = np.zeros(3, np.int64)
    for rung in rungs:
        attack = rung.attack
        if rung.view and rung.view not in meter.views:
            continue
        budget = getattr(attack, "budget", None)
        if budget is None:
            return None
        answers = budget(classes, norm)
        forwards = answers * meter.passes(rung.view) + (answers if rung.view else 0)
        columns = classes if getattr(attack, "several", False) or attack.info.name in JACOBIANS else 1
        blind = getattr(attack, "blind", False) or attack.info.access == "score"
        wide = attack.length(norm) + 1 if getattr(attack, "last_resort", False) else answers
        # One more of each for the verdict.
        total += [forwards + 1, 0 if blind else forwards * columns, wide + 1]
    forwards, backwards, passes = total.tolist()
    return forwards, backwards, passes
