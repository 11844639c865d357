"""The beginning of an evaluation, watched: how fast the model is, and what images drawn at random take.

It is the evaluation's own work on a few of its images, in their real order of attacks; what comes out is costs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from robustkit.attack_api import RowWise
from robustkit.core.errors import UsageError
from robustkit.core.isolation import evaluation_mode, own_randomness, threads
from robustkit.core.shapes import Images
from robustkit.engine.batching.continuous_batch import WEIGHED
from robustkit.engine.batching.forward_passes import looks
from robustkit.engine.batching.samples import Admitted, Finished
from robustkit.engine.evaluation.batch_runner import Work
from robustkit.engine.evaluation.block_runner import BlockRunner
from robustkit.engine.evaluation.early_stopping import shuffled
from robustkit.engine.evaluation.results import STANDS, RunResults
from robustkit.engine.evaluation.run import MOST_SLOTS, Evaluation
from robustkit.engine.model.instrumented_model import MAX_TRIAL_BATCH, InstrumentedModel
from robustkit.engine.model.random_verdicts import MOST
from robustkit.engine.planning.arm_costs import Observed
from robustkit.engine.planning.measurements import Memory, Over, PassCounter, Speed, Watch
from robustkit.engine.progress import Progress
from robustkit.gradient_views.discovery import is_applicable
from robustkit.registry import SuiteEntry
from robustkit.runs.ledger import Ledger

# The first images are as many as a quarter of the time is enough for, at so many passes each, within these ends.
TYPICAL = 100
FEWEST, FIRST = 2, 64
# A batch that takes more than this share of the time is the largest that is timed.
LONGEST = 0.1
# Where a suite has arms, images get this share of the time for the other attacks, and then meet the arms.
BEFORE_ARMS = 0.5
# Attacks that ask for a backward pass for each class.
JACOBIANS = ("autoattack:fab",)


@dataclass(frozen=True)
class ProbeResult:
    """What a pilot found on the images at `positions`.

    Attributes:
        positions: drawn at random, in the order taken.
        forwards: of each image's attacks but the arms, 0 for those that the model gets wrong as they are.
        backwards: likewise.
        passes: of each, from boarding to its verdict; they follow one another.
        through: which have their verdict; of the others the costs are not known.
        robust: how many of these withstood everything.
        stray: forwards and backwards of those that are not through.
        most: forwards, backwards and passes of an image that withstands everything but the arms for as long as the
            attacks may last; None where one of them does not say.
        arms: what was seen of the arms; None of a suite without.
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
    arms: Observed | None
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
    instrumented: InstrumentedModel


class ProfilingRunner(BlockRunner):
    """A worker that notes what each image costs it."""

    instrumented: PassCounter
    progress: Watch
    write_every = 0.0

    def note(self, end: float) -> None:
        """Begin to take notes; attacks go on until the clock says `end`."""
        n = len(self.samples)
        self.end = end
        self.forwards, self.backwards, self.passes = (np.zeros(n, np.int64) for _ in range(3))
        self.boarded: dict[int, int] = {}
        self.reached = 0
        self.ended = False
        self.cleaning = self.checking = 0.0
        self.aside = np.zeros(3, np.int64)

    @property
    def counts(self) -> np.ndarray:
        """Forwards, backwards and passes of the attacks so far."""
        return self.instrumented.counts - self.aside

    def clean(self, among: np.ndarray) -> None:
        """Do the clean pass, whatever the clock says, and keep its costs apart."""
        begun, before = self.progress.clock(), self.instrumented.counts
        self.progress.end = math.inf
        super().clean(among)
        self.cleaning += self.progress.clock() - begun
        self.aside += self.instrumented.counts - before
        # What the clean pass took is not taken from the attacks.
        self.end += self.progress.clock() - begun
        self.progress.end = self.end
        self.progress.rest()

    def _do(self, stage: int, number: int, positions: np.ndarray, x: Images, work: Work) -> None:
        begun = self.progress.clock()
        super()._do(stage, number, positions, x, work)
        if work == self._check:
            self.checking += self.progress.clock() - begun

    def through(
        self,
        first: int,
        count: int,
        gate: Callable[[Sequence[int]], Callable[[int], Admitted]],
        examples: np.ndarray,
        active: object = (),
    ) -> None:
        """Take those who board through `count` attacks from stage `first` on.

        Verdicts of an arm are held until all are there: the first to land are those that it breaks.
        """
        if not self.entries[first - 1].arm:
            self.reached = max(self.reached, first + count - 1)
        self.boarded = {}
        self.held: list[tuple[int, int, int, list[Finished], float]] = []
        super().through(first, count, gate, examples)
        for finished in self.held:
            super()._write_landed(*finished)

    def _gate(self, waiting: np.ndarray) -> Callable[[int], Admitted]:
        admit = super()._gate(waiting)

        def noted(free: int) -> Admitted:
            admitted = admit(free)
            for position in admitted.position.tolist():
                self.boarded.setdefault(position, self.instrumented.calls)
            return admitted

        return noted

    def _write_landed(self, first: int, count: int, number: int, finished: list[Finished], seconds: float) -> None:
        if self.entries[first - 1].arm:
            self.held.append((first, count, number, finished, seconds))
            return
        super()._write_landed(first, count, number, finished, seconds)
        for part in finished:
            forwards, backwards = part.spent.sum(1).T
            self.forwards[part.position] += forwards
            self.backwards[part.position] += backwards
            self.passes[part.position] += [
                self.instrumented.calls - self.boarded[at] for at in part.position.tolist()
            ]

    def block(self, stage: int, number: int, positions: np.ndarray, x: Images, done: int = 0) -> None:
        """Run one attack on these; each image's costs are taken to be the same."""
        self.reached = max(self.reached, stage)
        before = self.instrumented.counts
        super().block(stage, number, positions, x, done)
        forwards, backwards, calls = self.instrumented.counts - before
        self.forwards[positions] += round(forwards / len(positions))
        self.backwards[positions] += round(backwards / len(positions))
        self.passes[positions] += calls


@dataclass(frozen=True)
class CostProbe(Evaluation):
    """An evaluation of which only the beginning is done: attacks for about `budget` seconds."""

    budget: float = 10.0
    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        super().__post_init__()
        if not 0 < self.budget < math.inf:
            raise UsageError(f"seconds {self.budget:g}: write how long to measure, a positive number such as 10.")

    def look(self, progress: Progress | None = None) -> ProbeResult:
        """Return what the first images take; `progress` is told the news.

        Raises:
            UsageError: as an evaluation would.
            RunError: likewise.
        """
        memory = Memory(self.device)
        results = RunResults.of(len(self.samples), [entry.spec for entry in self.entries])
        with Ledger.open(None, "plan") as ledger, evaluation_mode(self.model):
            instrumented = PassCounter(self.model, self.device, self._precision)
            watch = Watch(memory, self.clock, instrumented, progress or Progress())
            runner = ProfilingRunner(
                self.samples,
                self.threat,
                self.entries,
                self.seed,
                self.batch,
                ledger,
                results,
                instrumented,
                watch,
                self.slots,
                self.precision == "auto",
                MOST_SLOTS if self.batch_size is None and self.device.type == "cuda" else self.slots,
            )
            begun = self.clock()
            runner.prepare()
            with threads(instrumented.threads):
                order = shuffled(len(self.samples), self.seed)
                reading = time.perf_counter()
                x = self.samples.images(order[:MAX_TRIAL_BATCH])
                read = (time.perf_counter() - reading) / len(x)
                flies = any(isinstance(entry.attack, RowWise) for entry in self.entries)
                if flies:
                    runner._tune(order[:MAX_TRIAL_BATCH])
                start = self.clock() - begun
                most = runner.slots if flies else self.batch
                with instrumented.using(runner.config or instrumented.config), own_randomness(self.seed, "speed"):
                    speed = instrumented.speed(x.to(self.device), most, LONGEST * self.budget)
                memory.look()
                begun = self.clock()
                runner.note(begun + self.budget)
                watch.rest()
                self._go(runner, order, speed)
                seconds = self.clock() - begun - runner.cleaning
        return self._found(runner, start, speed, seconds, read, memory)

    def _go(self, runner: ProfilingRunner, order: np.ndarray, speed: Speed) -> None:
        """Take block after block through the suite, and then all of them through the arms, until time is over."""
        try:
            self._ordinary(runner, order, speed)
            if runner.results.arms:
                self._rounds(runner).run(runner.results.scope)
                runner.ended = True
                # What the arms brought up may call for spare attacks.
                self._block(runner, runner.results.scope)
        except Over:
            return

    def _allocate(self, worker: BlockRunner, among: np.ndarray) -> None:
        """Leave the arms for later."""

    def _ordinary(self, runner: ProfilingRunner, order: np.ndarray, speed: Speed) -> None:
        results, begun, taken = runner.results, self.clock(), 0
        budget = self.budget * (BEFORE_ARMS if results.arms else 1)
        size = int(0.25 * budget / max(TYPICAL * speed.both, 1e-9))
        size = min(max(size, FEWEST), FIRST)
        results.scope = order[:0]
        while size and taken < len(order):
            block = order[taken : taken + size]
            taken += len(block)
            results.scope = order[:taken]
            before = self.clock() - begun - runner.cleaning
            self._block(runner, block)
            spent = self.clock() - begun - runner.cleaning
            left = budget - spent
            # Few images take as long as more, since the steps of each follow one another: that time is the arms'.
            least = spent - before if results.arms else 0.0
            size = min(taken, int(0.8 * left * taken / max(spent, 1e-9))) if left > least else 0

    def _found(
        self, runner: ProfilingRunner, start: float, speed: Speed, seconds: float, read: float, memory: Memory
    ) -> ProbeResult:
        results, positions = runner.results, runner.results.scope
        sure = [number for number, entry in enumerate(self.entries, 1) if not (entry.spare or entry.arm)]
        last = max([*sure, runner.reached])
        stood = results.fell[positions] == STANDS
        through = ~stood | (results.judged[positions] >= last)
        costs = [counts[positions] for counts in (runner.forwards, runner.backwards, runner.passes)]
        forwards, backwards, passes = (np.where(through, cost, 0) for cost in costs)
        spent, (overhead, drag) = runner.counts, runner.progress.fit(speed, seconds)
        meant = [
            entry
            for number, entry in enumerate(self.entries, 1)
            if not entry.arm and (not entry.spare or number <= runner.reached)
        ]
        return ProbeResult(
            positions=positions,
            forwards=forwards,
            backwards=backwards,
            passes=passes,
            through=through,
            robust=int((stood & through).sum()),
            stray=(int(max(spent[0] - forwards.sum(), 0)), int(max(spent[1] - backwards.sum(), 0))),
            most=most_of(meant, runner.instrumented, self.threat.norm),
            arms=self._seen(runner, positions[through]),
            speed=speed,
            seconds=seconds,
            overhead=overhead,
            drag=drag,
            start=start,
            checks=runner.checking,
            clean=max(runner.cleaning - runner.checking, 0.0) / len(positions),
            read=read,
            image_bytes=self.samples.images([0]).nbytes,
            slots=runner.slots,
            held=memory.held,
            peak=memory.peak,
            instrumented=runner.instrumented,
        )

    def _seen(self, runner: ProfilingRunner, positions: np.ndarray) -> Observed | None:
        """Return what these images, which are through all else, say of the arms."""
        rounds = self._rounds(runner)
        evidence = rounds.known(positions)
        if evidence is None:
            return None
        arms = [self.entries[stage - 1] for stage in rounds.stages]
        most = np.array([most_of([arm], runner.instrumented, self.threat.norm) for arm in arms], float)
        # What gives up where it does not come far may take as little as its patience.
        patience = np.array([getattr(arm.attack, "patience", None) or np.inf for arm in arms])
        costs = [runner.results.costs[stage] for stage in rounds.stages]
        met = evidence.met.sum(1)[:, None]
        spent = np.array([(cost.forwards, cost.backwards) for cost in costs], float) / np.maximum(met, 1)
        return Observed(
            evidence=evidence,
            images=len(positions),
            ended=runner.ended,
            spent=np.where(met > 0, spent, np.nan),
            least=np.minimum(patience / most[:, 0].clip(1), 1),
            most=most,
        )


def most_of(entries: list[SuiteEntry], instrumented: InstrumentedModel, norm: str) -> tuple[int, int, int] | None:
    """Return the most forwards, backwards and successive passes that an image may take; None if one is unknown."""
    classes = instrumented.num_classes or 2
    total = np.zeros(3, np.int64)
    for entry in entries:
        attack = entry.attack
        if not is_applicable(entry.view, instrumented.views, [entry.view for entry in entries]):
            continue
        budget = getattr(attack, "budget", None)
        if budget is None:
            return None
        answers = budget(classes, norm)
        passes = instrumented.passes(entry.view)
        options = attack.loop_options(norm) if isinstance(attack, RowWise) else None
        vector = options is not None and options.vector_objective
        columns = classes if vector or attack.info.name in JACOBIANS else 1
        seen = len(passes) * looks(entry.view, random=instrumented.random)
        forwards, backwards = answers * (sum(passes) + seen), answers * sum(passes) * columns
        scores = attack.info.access == "score" or (options is not None and not options.needs_gradient)
        parallel = options is not None and (entry.arm or options.boundary_only is not None)
        wide = options.steps + 1 if options and parallel else answers
        # More for a verdict; of a random model twice, and to compare its nearest points.
        verdict = 2 * (MOST + WEIGHED) if instrumented.random else 1
        total += [forwards + verdict, 0 if scores else backwards, wide * (sum(passes) + seen) + verdict]
    forwards, backwards, passes = total.tolist()
    return forwards, backwards, passes
