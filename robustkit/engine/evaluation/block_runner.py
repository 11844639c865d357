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
from robustkit.engine.model.profiling import fastest_batch, measure, tune
from robustkit.engine.model.random_verdicts import is_random
from robustkit.runs.recorded_outputs import OutputRecord, recorded_call, recording

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
        self.reliability = Reliability(
            self.samples, self.instrumented, self.results, self.entries, self.store, self.named("outlook")
        )
        self.ran: dict[str, Any] = {}
        self.config: ExecutionConfig | None = None

    def prepare(self) -> None:
        """Try the model on one image, size the pieces to the memory, refuse an eps without limits."""
        image = self.samples.images([0])
        shape = tuple(image.shape[1:])
        refuse_endless(self.threat, shape)
        try:
            with own_randomness(self.seed, "prepare"):
                measure(
                    self.instrumented, image.to(self.instrumented.device), max(self.batch, self.slots, self.most)
                )
                few = self.samples.images(range(min(FEW, len(self.samples)))).to(self.instrumented.device)
                with recording(self.store, self.named("prepare")):
                    self.instrumented.random = is_random(partial(recorded_call, self.instrumented.model), few)
        except RobustkitError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise RunError(NO_MEMORY) from error
            raise UsageError(f"the model failed with {described(error)}; correct its code.") from error

    def fly(self, first: int, count: int, among: np.ndarray) -> None:
        """Take what still stands of these through `count` attacks from stage `first` on, all row-wise, at once."""
        waiting = self.results.waiting(first, among)
        self.progress.stage(self._title(first, count), len(waiting), self.results.robust, self.results.n)

        def gate(taken: Sequence[int]) -> Callable[[int], Admitted]:
            return self._gate(waiting[~np.isin(waiting, taken)])

        if len(waiting):
            self.through(first, count, gate, waiting)

    def _title(self, first: int, count: int) -> str:
        names = self.results.names[first : first + count]
        return names[0] if count == 1 else f"{names[0]} … {names[-1]}"

    def through(
        self,
        first: int,
        count: int,
        gate: Callable[[Sequence[int]], Callable[[int], Admitted]],
        examples: np.ndarray,
        active: Sequence[tuple[int, RowBatch]] = (),
    ) -> None:
        """Take those who board, and those `aboard` already, through `count` attacks from stage `first` on.

        `gate` says who boards of those that are not taken already, `examples` are positions of images to choose
        the way to search by. Arms search in float32. What a killed run had under way goes on.
        """
        self.ran = {"claims_refused": 0, "searched_again": 0, **self.ran}
        with own_randomness(self.seed, "flight", first, *self.lot):
            try:
                self._tune(examples)
                exact = replace(self.config or self.instrumented.config, dtype=None)
                arms = self.entries[first - 1].arm
                with recording(self.store, self.block_name(first)) as answers:
                    saved = SavedRows.of(answers.first(), self, first)
                    near: Mapping[int, np.ndarray] = saved.near
                    if not saved.again:
                        admit = gate([*saved.positions, *near])
                        with self.instrumented.using(exact if arms else self.config):
                            near = self._fly(first, count, admit, saved.begin(active), answers)
                        saved = SavedRows(again=bool(near), near=near)
                        answers.restart(saved.record([]))
                    if saved.again:
                        self.ran["searched_again"] += len(near)
                        admit = self._gate(np.array(sorted(near.keys() - set(saved.positions)), np.int64))
                        with self.instrumented.using(exact):
                            self._fly(first, count, admit, saved, answers)
                    answers.restart()
            except (RobustkitError, TimeUp):
                raise
            except Exception as error:
                title = self._title(first, count)
                raise RunError(f"{title} failed with {described(error)}.") from error

    def block_name(self, first: int) -> str:
        """Return the name by which what is under way is saved."""
        return f"flight-{first}"

    def named(self, work: str) -> str:
        """Return the name by which work is saved that each of several workers does."""
        return "-".join([work, *map(str, self.lot)])

    def still(self, first: int) -> np.ndarray:
        """Return the positions that have no verdict from this stage on."""
        return self.results.waiting(first, np.arange(self.results.n))

    def _mend(self, error: Exception) -> None:
        """Halve the pieces if memory was short; else raise the error again."""
        if not is_out_of_memory(error):
            raise error
        self._halve(self.slots)

    def _fly(
        self, first: int, count: int, admit: Callable[[int], Admitted], saved: SavedRows, answers: OutputRecord
    ) -> dict[int, np.ndarray]:
        """Take samples through, and write them down but for those that rounding may have saved.

        Returned is what those left out have cost, by position. They are the robust ones that a search in low
        precision brought within `NEAR` of the way to the boundary; last resorts are left to the search after it,
        which is in float32.
        """
        spent: Mapping[int, np.ndarray] = saved.near if saved.again else {}
        running = ContinuousBatch(
            instrumented=self.instrumented,
            threat=self.threat,
            entries=self.entries[first - 1 : first - 1 + count],
            streams=[self._stream(stage) for stage in range(first, first + count)],
            seed=self.seed,
            slots=self.slots,
            admit=admit,
            mend=self._mend,
            pace=PACE if self.instrumented.device.type == "cuda" else 1,
            wide=bool(spent) or self.entries[first - 1].arm,
            suite=[entry.view for entry in self.entries],
            steady=not (self.instrumented.random or UNSTEADY & self.results.flags.keys()),
        )
        saved.put_aboard(running)
        number = self.results.next_chunk(first)
        begun, finished, done = time.perf_counter() - saved.seconds, list[Finished](), 0
        near = {} if saved.again else dict(saved.near)
        self.instrumented.detached = saved.detached
        clock = Clock()
        for group in running.run():
            for part in group:
                for at, position in enumerate(part.position.tolist()):
                    part.spent[at] += spent.get(position, 0)
                doubted = np.zeros(len(part.position), bool)
                if self.instrumented.rounding:
                    least = NEAR * self.results.clean_margins[part.position]
                    doubted = ~part.judged.fooled.cpu().numpy() & (part.judged.margin.cpu().numpy() < least)
                near |= dict(zip(part.position[doubted].tolist(), part.spent[doubted], strict=True))
                finished.append(part.select(~doubted))
                done += len(part.position)
            self.progress.advance(done + running.under_way, self.results.robust)
            now = time.perf_counter()
            due = clock.due(now)
            if finished and (due or now - begun > self.write_every or not running.active or now > self.deadline):
                self._write_landed(first, count, number, finished, now - begun)
                number, begun, finished = number + 1, now, []
            if due and self.store.keeps and running.active:
                state = SavedRows(
                    saved.again, spent or near, now - begun, running.refused, self.instrumented.detached
                )
                answers.restart(state.record(running.state()), on=clock.slow or self.instrumented.random)
                clock.saved(now)
            self._on_time()
            self._share(running)
        self.ran["claims_refused"] += running.refused
        if not (spent or self.entries[first - 1].arm):
            self.ran |= {
                "precision": self.instrumented.precision,
                "layout": self.instrumented.layout,
                "folded": self.instrumented.config.net is not self.instrumented.model,
                "slots": running.slots,
                "occupancy": running.occupancy,
            }
        return near

    def _share(self, running: ContinuousBatch) -> None:
        """Give away some of those aboard if another worker has nothing to do; here there is none."""

    def _tune(self, waiting: np.ndarray) -> None:
        """Find the fastest way to search, once; other packages' attacks get the model as it is."""
        if self.config is None:
            instrumented = self.instrumented
            x = self.samples.images(waiting[: min(self.slots, instrumented.trial_batch)]).to(instrumented.device)
            with instrumented.using(instrumented.config), own_randomness(self.seed, "tune"):
                with recording(self.store, self.named("tune")) as answers:
                    tune(instrumented, x, precision=self.free)
                    # A resumed run, on a machine that may be busier, searches in the same way.
                    answers.write()
                self.config = instrumented.config
                if self.most > self.slots and instrumented.slow_batch is None:
                    self.slots = fastest_batch(instrumented, x, self.slots, self.most)

    def _gate(self, waiting: np.ndarray) -> Callable[[int], Admitted]:
        """Return what gives the next so many of these samples; images are read in larger blocks."""
        device = self.instrumented.device
        blocks = read_ahead(self.samples, np.split(waiting, range(self.batch, len(waiting), self.batch)))
        block, images = np.zeros(0, np.int64), torch.zeros(0)

        def admit(free: int) -> Admitted:
            nonlocal block, images
            while len(block) < free and (following := next(blocks, None)) is not None:
                more, read = following
                self.check_images(more, image_hashes(read))
                images = torch.cat([images, read]) if len(block) else read
                block = np.concatenate([block, more])
            now, block = block[:free], block[free:]
            x, images = images[:free], images[free:]
            labels = torch.from_numpy(self.samples.labels[now])
            clean = torch.from_numpy(-self.results.clean_margins[now])
            nearest = torch.from_numpy(-self.results.margins[now])
            if device.type == "cuda":
                x = x.pin_memory()
            ids = self.ids(now)
            x, labels = x.to(device, non_blocking=True), labels.to(device)
            return Admitted(now, ids, x, labels, clean.to(device), nearest.to(device))

        return admit

    def _write_landed(self, first: int, count: int, number: int, finished: list[Finished], seconds: float) -> None:
        """Write down who has landed in so many seconds."""
        self.writer.land(first, count, number, finished, seconds)
