"""Does an evaluation's chunks: batch by batch, or in flights of all attacks that can share one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from robustkit.checks.run import UNSTEADY
from robustkit.core.errors import RobustkitError, RunError, UsageError
from robustkit.core.isolation import own_randomness
from robustkit.data.prefetch import read_ahead
from robustkit.engine.batching.continuous_batch import ContinuousBatch
from robustkit.engine.batching.row_batch import RowBatch
from robustkit.engine.batching.samples import Admitted, Finished
from robustkit.engine.batching.saved_rows import Clock, SavedRows
from robustkit.engine.evaluation.batch_runner import BatchRunner
from robustkit.engine.evaluation.early_stopping import TimeUp
from robustkit.engine.evaluation.reliability import Reliability
from robustkit.engine.evaluation.sanity import refuse_endless
from robustkit.engine.evaluation.verdicts import image_hashes
from robustkit.engine.failures import NO_MEMORY, described, is_out_of_memory
from robustkit.engine.model.instrumented_model import ExecutionConfig
from robustkit.engine.model.random_verdicts import is_random
from robustkit.runs.recorded_answers import Answers, asked, recording

# How many steps a GPU goes before the host looks at it, and how long verdicts wait to be written (seconds).
PACE = 4
WRITE_EVERY = 5.0
# Robust images are searched again in float32 where a faster search left less than this share of the clean margin.
NEAR = 0.05
# How many images tell whether a model is random.
FEW = 4


@dataclass
class BlockRunner(BatchRunner):
    """Does one run's chunks.

    `slots` are the rows of a flight's passes, `free` is whether flights may choose their precision, `most` how
    many slots they may choose. `lot` sets the draws of a random model apart from those of other workers of the
    same run; verdicts wait `write_every` seconds to be written.
    """

    slots: int
    free: bool
    most: int = 0
    lot: tuple[int, ...] = ()

    write_every = WRITE_EVERY

    def __post_init__(self) -> None:
        """Begin with nothing flown."""
        super().__post_init__()
        self.doubts = Reliability(
            self.samples, self.meter, self.tally, self.rungs, self.store, self.named("outlook")
        )
        self.flown: dict[str, Any] = {}
        self.way: ExecutionConfig | None = None

    def prepare(self) -> None:
        """Try the model on one image, size the pieces to the memory, refuse an eps without limits."""
        image = self.samples.images([0])
        shape = tuple(image.shape[1:])
        refuse_endless(self.threat, shape)
        try:
            with own_randomness(self.seed, "prepare"):
                self.meter.size_up(image.to(self.meter.device), max(self.batch, self.slots, self.most))
                few = self.samples.images(range(min(FEW, len(self.samples)))).to(self.meter.device)
                with recording(self.store, self.named("prepare")):
                    self.meter.random = is_random(partial(asked, self.meter.model), few)
        except RobustkitError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise RunError(NO_MEMORY) from error
            raise UsageError(f"the model failed with {described(error)}; correct its code.") from error

    def fly(self, first: int, count: int, among: np.ndarray) -> None:
        """Take what still stands of these through `count` attacks from stage `first` on, all row-wise, at once."""
        waiting = self.tally.waiting(first, among)
        self.progress.stage(self._title(first, count), len(waiting), self.tally.robust, self.tally.n)

        def gate(taken: Sequence[int]) -> Callable[[int], Admitted]:
            return self._gate(waiting[~np.isin(waiting, taken)])

        if len(waiting):
            self.through(first, count, gate, waiting)

    def _title(self, first: int, count: int) -> str:
        names = self.tally.names[first : first + count]
        return names[0] if count == 1 else f"{names[0]} … {names[-1]}"

    def through(
        self,
        first: int,
        count: int,
        gate: Callable[[Sequence[int]], Callable[[int], Admitted]],
        examples: np.ndarray,
        aboard: Sequence[tuple[int, RowBatch]] = (),
    ) -> None:
        """Take those who board, and those `aboard` already, through `count` attacks from stage `first` on.

        `gate` says who boards of those that are not taken already, `examples` are positions of images to choose
        the way to search by. Arms search in float32. What a killed run had under way goes on.
        """
        self.flown = {"claims_refused": 0, "searched_again": 0, **self.flown}
        with own_randomness(self.seed, "flight", first, *self.lot):
            try:
                self._tune(examples)
                exact = replace(self.way or self.meter.way, dtype=None)
                arms = self.rungs[first - 1].arm
                with recording(self.store, self.flight(first)) as answers:
                    saved = SavedRows.of(answers.first(), self, first)
                    near: Mapping[int, np.ndarray] = saved.near
                    if not saved.again:
                        board = gate([*saved.positions, *near])
                        with self.meter.searching(exact if arms else self.way):
                            near = self._fly(first, count, board, saved.begin(aboard), answers)
                        saved = SavedRows(again=bool(near), near=near)
                        answers.restart(saved.record([]))
                    if saved.again:
                        self.flown["searched_again"] += len(near)
                        board = self._gate(np.array(sorted(near.keys() - set(saved.positions)), np.int64))
                        with self.meter.searching(exact):
                            self._fly(first, count, board, saved, answers)
                    answers.restart()
            except (RobustkitError, TimeUp):
                raise
            except Exception as error:
                title = self._title(first, count)
                raise RunError(f"{title} failed with {described(error)}.") from error

    def flight(self, first: int) -> str:
        """Return the name by which what is under way is saved."""
        return f"flight-{first}"

    def named(self, work: str) -> str:
        """Return the name by which work is saved that each of several workers does."""
        return "-".join([work, *map(str, self.lot)])

    def still(self, first: int) -> np.ndarray:
        """Return the positions that have no verdict from this stage on."""
        return self.tally.waiting(first, np.arange(self.tally.n))

    def _mend(self, error: Exception) -> None:
        """Halve the pieces if memory was short; else raise the error again."""
        if not is_out_of_memory(error):
            raise error
        self._halve(self.slots)

    def _fly(
        self, first: int, count: int, board: Callable[[int], Admitted], saved: SavedRows, answers: Answers
    ) -> dict[int, np.ndarray]:
        """Take samples through, and write them down but for those that rounding may have saved.

        Returned is what those left out have cost, by position. They are the robust ones that a search in low
        precision brought within `NEAR` of the way to the boundary; last resorts are left to the search after it,
        which is in float32.
        """
        spent: Mapping[int, np.ndarray] = saved.near if saved.again else {}
        flight = ContinuousBatch(
            meter=self.meter,
            threat=self.threat,
            rungs=self.rungs[first - 1 : first - 1 + count],
            streams=[self._stream(stage) for stage in range(first, first + count)],
            seed=self.seed,
            slots=self.slots,
            board=board,
            mend=self._mend,
            pace=PACE if self.meter.device.type == "cuda" else 1,
            wide=bool(spent) or self.rungs[first - 1].arm,
            suite=[rung.view for rung in self.rungs],
            steady=not (self.meter.random or UNSTEADY & self.tally.flags.keys()),
        )
        saved.put_aboard(flight)
        number = self.tally.next_chunk(first)
        begun, landed, done = time.perf_counter() - saved.seconds, list[Finished](), 0
        near = {} if saved.again else dict(saved.near)
        self.meter.detached = saved.detached
        clock = Clock()
        for group in flight.run():
            for part in group:
                for at, position in enumerate(part.position.tolist()):
                    part.spent[at] += spent.get(position, 0)
                doubted = np.zeros(len(part.position), bool)
                if self.meter.rounding:
                    least = NEAR * self.tally.clean_margins[part.position]
                    doubted = ~part.judged.fooled.cpu().numpy() & (part.judged.margin.cpu().numpy() < least)
                near |= dict(zip(part.position[doubted].tolist(), part.spent[doubted], strict=True))
                landed.append(part.select(~doubted))
                done += len(part.position)
            self.progress.advance(done + flight.under_way, self.tally.robust)
            now = time.perf_counter()
            due = clock.due(now)
            if landed and (due or now - begun > self.write_every or not flight.aboard or now > self.deadline):
                self._write_landed(first, count, number, landed, now - begun)
                number, begun, landed = number + 1, now, []
            if due and self.store.keeps and flight.aboard:
                state = SavedRows(saved.again, spent or near, now - begun, flight.refused, self.meter.detached)
                answers.restart(state.record(flight.state()), on=clock.slow or self.meter.random)
                clock.saved(now)
            self._on_time()
            self._share(flight)
        self.flown["claims_refused"] += flight.refused
        if not (spent or self.rungs[first - 1].arm):
            self.flown |= {
                "precision": self.meter.precision,
                "layout": self.meter.layout,
                "folded": self.meter.way.net is not self.meter.model,
                "slots": flight.slots,
                "occupancy": flight.occupancy,
            }
        return near

    def _share(self, flight: ContinuousBatch) -> None:
        """Give away some of those aboard if another worker has nothing to do; here there is none."""

    def _tune(self, waiting: np.ndarray) -> None:
        """Find the fastest way to search, once; other packages' attacks get the model as it is."""
        if self.way is None:
            meter = self.meter
            x = self.samples.images(waiting[: min(self.slots, meter.trial)]).to(meter.device)
            with meter.searching(meter.way), own_randomness(self.seed, "tune"):
                with recording(self.store, self.named("tune")) as answers:
                    meter.tune(x, precision=self.free)
                    # A resumed run, on a machine that may be busier, searches in the same way.
                    answers.write()
                self.way = meter.way
                if self.most > self.slots and meter.quick is None:
                    self.slots = meter.widest(x, self.slots, self.most)

    def _gate(self, waiting: np.ndarray) -> Callable[[int], Admitted]:
        """Return what gives the next so many of these samples; images are read in larger blocks."""
        device = self.meter.device
        blocks = read_ahead(self.samples, np.split(waiting, range(self.batch, len(waiting), self.batch)))
        block, images = np.zeros(0, np.int64), torch.zeros(0)

        def board(free: int) -> Admitted:
            nonlocal block, images
            while len(block) < free and (following := next(blocks, None)) is not None:
                more, read = following
                self.check_images(more, image_hashes(read))
                images = torch.cat([images, read]) if len(block) else read
                block = np.concatenate([block, more])
            now, block = block[:free], block[free:]
            x, images = images[:free], images[free:]
            labels = torch.from_numpy(self.samples.labels[now])
            clean = torch.from_numpy(-self.tally.clean_margins[now])
            nearest = torch.from_numpy(-self.tally.margins[now])
            if device.type == "cuda":
                x = x.pin_memory()
            ids = self.ids(now)
            x, labels = x.to(device, non_blocking=True), labels.to(device)
            return Admitted(now, ids, x, labels, clean.to(device), nearest.to(device))

        return board

    def _write_landed(self, first: int, count: int, number: int, landed: list[Finished], seconds: float) -> None:
        """Write down who has landed in so many seconds."""
        self.scribe.land(first, count, number, landed, seconds)
