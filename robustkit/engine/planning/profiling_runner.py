"""A block runner that notes what each image costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from robustkit.core.shapes import Images
from robustkit.engine.batching.samples import Admitted, Finished
from robustkit.engine.evaluation.batch_runner import Work
from robustkit.engine.evaluation.block_runner import BlockRunner
from robustkit.engine.planning.measurements import PassCounter, Stopwatch


class ProfilingRunner(BlockRunner):
    """A block runner that notes each image's forwards, backwards and passes.

    Attributes:
        forwards, backwards, passes: of each image's attacks (n); passes follow one another.
        reached: the last stage that ran, arms left out.
        arms_done: whether the rounds of the arms ended before the time was up.
        clean_seconds: of the clean pass and the checks.
        check_seconds: of the checks.
        clean_counts: forwards, backwards and passes of both.
    """

    instrumented: PassCounter
    progress: Stopwatch
    write_every = 0.0

    def start(self, end: float) -> None:
        """Start to measure; attacks run until the clock reads `end`."""
        n = len(self.samples)
        self.end = end
        self.forwards, self.backwards, self.passes = (np.zeros(n, np.int64) for _ in range(3))
        self.admitted: dict[int, int] = {}
        self.reached = 0
        self.arms_done = False
        self.clean_seconds = self.check_seconds = 0.0
        self.clean_counts = np.zeros(3, np.int64)

    @property
    def counts(self) -> np.ndarray:
        """Forwards, backwards and passes of the attacks so far."""
        return self.instrumented.counts - self.clean_counts

    def run_clean(self, positions: np.ndarray) -> None:
        """Run the clean pass without a time limit, and keep its costs apart."""
        begun, before = self.progress.clock(), self.instrumented.counts
        self.progress.end = math.inf
        super().run_clean(positions)
        spent = self.progress.clock() - begun
        self.clean_seconds += spent
        self.clean_counts += self.instrumented.counts - before
        # The attacks get the time that the clean pass took.
        self.end += spent
        self.progress.end = self.end
        self.progress.restart()

    def _run_chunk(self, stage: int, number: int, positions: np.ndarray, x: Images, work: Work) -> None:
        begun = self.progress.clock()
        super()._run_chunk(stage, number, positions, x, work)
        if work == self._check:
            self.check_seconds += self.progress.clock() - begun

    def run_admitted(
        self,
        first: int,
        count: int,
        admission: Callable[[Sequence[int]], Callable[[int], Admitted]],
        examples: np.ndarray,
        active: object = (),
    ) -> Iterator[None]:
        """Run `count` attacks from stage `first` on, and yield after every read of results from the device.

        An arm's verdicts are held back until all are there: the first to finish are those that it fools.
        """
        if not self.settings.entries[first - 1].arm:
            self.reached = max(self.reached, first + count - 1)
        self.admitted = {}
        self.held: list[tuple[int, int, int, list[Finished], float]] = []
        yield from super().run_admitted(first, count, admission, examples)
        for finished in self.held:
            super()._write_finished(*finished)

    def _admission(self, waiting: np.ndarray) -> Callable[[int], Admitted]:
        admit = super()._admission(waiting)

        def noted(free: int) -> Admitted:
            admitted = admit(free)
            for position in admitted.position.tolist():
                self.admitted.setdefault(position, self.instrumented.calls)
            return admitted

        return noted

    def _write_finished(
        self, first: int, count: int, number: int, finished: list[Finished], seconds: float
    ) -> None:
        if self.settings.entries[first - 1].arm:
            self.held.append((first, count, number, finished, seconds))
            return
        super()._write_finished(first, count, number, finished, seconds)
        for part in finished:
            forwards, backwards = part.spent.sum(1).T
            self.forwards[part.position] += forwards
            self.backwards[part.position] += backwards
            self.passes[part.position] += [
                self.instrumented.calls - self.admitted[position] for position in part.position.tolist()
            ]

    def run_attack_chunk(self, stage: int, number: int, positions: np.ndarray, x: Images, done: int = 0) -> None:
        """Run one attack on these images; each is taken to cost the same."""
        self.reached = max(self.reached, stage)
        before = self.instrumented.counts
        super().run_attack_chunk(stage, number, positions, x, done)
        forwards, backwards, calls = self.instrumented.counts - before
        self.forwards[positions] += round(forwards / len(positions))
        self.backwards[positions] += round(backwards / len(positions))
        self.passes[positions] += calls
