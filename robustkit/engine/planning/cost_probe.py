"""The beginning of an evaluation, measured: how fast the model is, and what random images cost.

It runs the evaluation's own attacks, in their order, on a few of its images.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from robustkit.attack_api import RowWise
from robustkit.core.devices import ComputeDevice
from robustkit.core.errors import UsageError
from robustkit.core.isolation import evaluation_mode, own_randomness, threads
from robustkit.engine.batching.claims import COMPARISON_DRAWS
from robustkit.engine.batching.forward_passes import deployed_passes
from robustkit.engine.evaluation.early_stopping import shuffled
from robustkit.engine.evaluation.results import ROBUST, RunResults
from robustkit.engine.evaluation.run import Evaluation
from robustkit.engine.evaluation.suite_run import run_suite
from robustkit.engine.model.instrumented_model import MAX_TRIAL_BATCH, InstrumentedModel
from robustkit.engine.model.random_verdicts import MAX_DRAWS
from robustkit.engine.planning.arm_costs import Observed
from robustkit.engine.planning.measurements import Memory, PassCounter, ProbeTimeUp, Speed, Stopwatch
from robustkit.engine.planning.profiling_runner import ProfilingRunner
from robustkit.engine.progress import Progress
from robustkit.gradient_views.discovery import is_applicable
from robustkit.registry import SuiteEntry
from robustkit.runs.ledger import Ledger

# The first block has as many images as a quarter of the time allows at so many passes each, between these limits.
ASSUMED_PASSES = 100
MIN_FIRST_BLOCK, MAX_FIRST_BLOCK = 2, 64
# A batch that takes more than this share of the time is the largest that is timed.
MAX_BATCH_SHARE = 0.1
# In a suite with arms, the share of the time for the other attacks, which run first.
SHARE_BEFORE_ARMS = 0.5
# Attacks that run a backward pass for each class.
JACOBIANS = ("autoattack:fab",)


@dataclass(frozen=True)
class ProbeResult:
    """What the images at `positions` cost (m of them).

    Attributes:
        positions: of random images, in the order in which they were attacked (m).
        forwards: of each image's attacks without the arms (m); 0 if its clean image is misclassified.
        backwards: likewise (m).
        passes: of each, one after another, from admission to verdict (m).
        finished: which have their verdict (m); the costs of the others are unknown.
        robust: how many of these are robust.
        unfinished: forwards and backwards of the images without a verdict.
        max_costs: forwards, backwards and passes of an image that stays robust for as long as the attacks without
            the arms may last; None if an attack does not say.
        arms: what was measured of the arms; None for a suite without arms.
        speed: of the model in a search.
        seconds: of the attacks.
        overhead: seconds of a pass whatever its size, work around it included.
        drag: seconds of an image's passes as a multiple of those of the model alone.
        start: seconds to measure the model and to choose its config.
        checks: seconds of the checks.
        clean: seconds of the clean pass per image.
        read: seconds to read an image, which are part of `clean`.
        image_bytes: of an image in float32.
        slots: rows in a pass of the whole run.
        memory_before: bytes.
        memory_peak: bytes.
        instrumented: the model as it was at the end.
    """

    positions: np.ndarray
    forwards: np.ndarray
    backwards: np.ndarray
    passes: np.ndarray
    finished: np.ndarray
    robust: int
    unfinished: tuple[int, int]
    max_costs: tuple[int, int, int] | None
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
    memory_before: int
    memory_peak: int
    instrumented: InstrumentedModel


@dataclass(frozen=True)
class CostProbe(Evaluation):
    """An evaluation whose attacks run for about `budget` seconds only."""

    budget: float = 10.0
    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self) -> None:
        """Check the values as an evaluation does, and the budget."""
        super().__post_init__()
        if not 0 < self.budget < math.inf:
            raise UsageError(f"seconds {self.budget:g}: write how long to measure, a positive number such as 10.")

    def measure(self, progress: Progress | None = None) -> ProbeResult:
        """Return what the first images cost; `progress` receives messages.

        Raises:
            UsageError: as an evaluation does.
            RunError: likewise.
        """
        memory = Memory(ComputeDevice(self.device))
        results = RunResults.of(len(self.samples), [entry.spec for entry in self.entries])
        with Ledger.open(None, "plan") as ledger, evaluation_mode(self.model):
            instrumented = PassCounter(self.model, self.device, self._precision)
            stopwatch = Stopwatch(memory, self.clock, instrumented, progress or Progress())
            runner = ProfilingRunner(self.samples, self.settings, ledger, results, instrumented, stopwatch)
            begun = self.clock()
            runner.prepare()
            with threads(instrumented.threads):
                order = shuffled(len(self.samples), self.seed)
                reading = time.perf_counter()
                x = self.samples.images(order[:MAX_TRIAL_BATCH])
                read = (time.perf_counter() - reading) / len(x)
                row_wise = any(isinstance(entry.attack, RowWise) for entry in self.entries)
                if row_wise:
                    runner.choose_config(order[:MAX_TRIAL_BATCH])
                start = self.clock() - begun
                largest = runner.slots if row_wise else self.chunk_size
                config = runner.config or instrumented.config
                with instrumented.using(config), own_randomness(self.seed, "speed"):
                    speed = instrumented.speed(x.to(self.device), largest, MAX_BATCH_SHARE * self.budget)
                memory.observe()
                begun = self.clock()
                runner.start(begun + self.budget)
                stopwatch.restart()
                self._run_blocks(runner, order, speed)
                seconds = self.clock() - begun - runner.clean_seconds
        return self._result(runner, start, speed, seconds, read, memory)

    def _run_blocks(self, runner: ProfilingRunner, order: np.ndarray, speed: Speed) -> None:
        """Run block after block through the suite, and then all of them through the arms, until the time is up."""
        try:
            self._run_without_arms(runner, order, speed)
            if runner.results.arms:
                self.rounds(runner).run(runner.results.scope)
                runner.arms_done = True
                # Images fooled by the arms may be a reason for conditional attacks.
                run_suite(runner, runner.results.scope, None)
        except ProbeTimeUp:
            return

    def _run_without_arms(self, runner: ProfilingRunner, order: np.ndarray, speed: Speed) -> None:
        results, begun, taken = runner.results, self.clock(), 0
        budget = self.budget * (SHARE_BEFORE_ARMS if results.arms else 1)
        size = int(0.25 * budget / max(ASSUMED_PASSES * speed.both, 1e-9))
        size = min(max(size, MIN_FIRST_BLOCK), MAX_FIRST_BLOCK)
        results.scope = order[:0]
        while size and taken < len(order):
            block = order[taken : taken + size]
            taken += len(block)
            results.scope = order[:taken]
            before = self.clock() - begun - runner.clean_seconds
            run_suite(runner, block, None)
            spent = self.clock() - begun - runner.clean_seconds
            left = budget - spent
            # A few images take as long as more, since their steps follow one another: the arms get that time.
            needed = spent - before if results.arms else 0.0
            size = min(taken, int(0.8 * left * taken / max(spent, 1e-9))) if left > needed else 0

    def _result(
        self, runner: ProfilingRunner, start: float, speed: Speed, seconds: float, read: float, memory: Memory
    ) -> ProbeResult:
        results, positions = runner.results, runner.results.scope
        always = [number for number, entry in enumerate(self.entries, 1) if not (entry.conditional or entry.arm)]
        last = max([*always, runner.reached])
        robust = results.fooled_at[positions] == ROBUST
        finished = ~robust | (results.judged[positions] >= last)
        costs = [counts[positions] for counts in (runner.forwards, runner.backwards, runner.passes)]
        forwards, backwards, passes = (np.where(finished, cost, 0) for cost in costs)
        spent, (overhead, drag) = runner.counts, runner.progress.fit(speed, seconds)
        expected = [
            entry
            for number, entry in enumerate(self.entries, 1)
            if not entry.arm and (not entry.conditional or number <= runner.reached)
        ]
        return ProbeResult(
            positions=positions,
            forwards=forwards,
            backwards=backwards,
            passes=passes,
            finished=finished,
            robust=int((robust & finished).sum()),
            unfinished=(int(max(spent[0] - forwards.sum(), 0)), int(max(spent[1] - backwards.sum(), 0))),
            max_costs=max_costs(expected, runner.instrumented, self.threat.norm),
            arms=self._observed_arms(runner, positions[finished]),
            speed=speed,
            seconds=seconds,
            overhead=overhead,
            drag=drag,
            start=start,
            checks=runner.check_seconds,
            clean=max(runner.clean_seconds - runner.check_seconds, 0.0) / len(positions),
            read=read,
            image_bytes=self.samples.images([0]).nbytes,
            slots=runner.slots,
            memory_before=memory.at_start,
            memory_peak=memory.peak,
            instrumented=runner.instrumented,
        )

    def _observed_arms(self, runner: ProfilingRunner, positions: np.ndarray) -> Observed | None:
        """Return the measurements of the arms on these images, which have finished all other attacks."""
        rounds = self.rounds(runner)
        evidence = rounds.known(positions)
        if evidence is None:
            return None
        arms = [self.entries[stage - 1] for stage in rounds.stages]
        most = np.array([max_costs([arm], runner.instrumented, self.threat.norm) for arm in arms], float)
        # An attack that stops without progress may take as few queries as its `patience`.
        patience = np.array([_least_queries(arm.attack, self.threat.norm) for arm in arms])
        costs = [runner.results.costs[stage] for stage in rounds.stages]
        met = evidence.met.sum(1)[:, None]
        spent = np.array([(cost.forwards, cost.backwards) for cost in costs], float) / np.maximum(met, 1)
        return Observed(
            evidence=evidence,
            images=len(positions),
            ended=runner.arms_done,
            spent=np.where(met > 0, spent, np.nan),
            least=np.minimum(patience / most[:, 0].clip(1), 1),
            most=most,
        )


def _least_queries(attack: Any, norm: str) -> float:
    """Return after how many queries an attack may stop without progress; infinity if it does not."""
    least: float = getattr(attack, "patience", None) or np.inf
    return float(min([least, *(queries for queries, _ in attack.loop_options(norm).checkpoints)]))


def max_costs(
    entries: list[SuiteEntry], instrumented: InstrumentedModel, norm: str
) -> tuple[int, int, int] | None:
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
        seen = len(passes) * deployed_passes(entry.view, random=instrumented.random)
        forwards, backwards = answers * (sum(passes) + seen), answers * sum(passes) * columns
        scores = attack.info.access == "score" or (options is not None and not options.needs_gradient)
        parallel = options is not None and (entry.arm or options.boundary_only is not None)
        wide = options.steps + 1 if options and parallel else answers
        # More for a verdict; of a random model twice, and to compare its nearest points.
        verdict = 2 * (MAX_DRAWS + COMPARISON_DRAWS) if instrumented.random else 1
        total += [forwards + verdict, 0 if scores else backwards, wide * (sum(passes) + seen) + verdict]
    forwards, backwards, passes = total.tolist()
    return forwards, backwards, passes
