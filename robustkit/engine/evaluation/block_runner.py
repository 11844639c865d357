"""Runs an evaluation's attacks: batch by batch, or by continuous batching those that can share passes."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from robustkit.checks.run import UNSTEADY
from robustkit.core.devices import ComputeDevice
from robustkit.core.errors import RobustkitError, RunError, UsageError
from robustkit.core.isolation import own_randomness
from robustkit.core.out_of_memory import NO_MEMORY, is_out_of_memory, retry_in_memory
from robustkit.core.shapes import Images
from robustkit.data.prefetch import read_ahead
from robustkit.engine.batching.continuous_batch import ContinuousBatch
from robustkit.engine.batching.row_batch import RowBatch
from robustkit.engine.batching.samples import Admitted, Finished
from robustkit.engine.batching.saved_rows import Clock, SavedRows
from robustkit.engine.evaluation.batch_runner import BatchRunner
from robustkit.engine.evaluation.early_stopping import TimeUp
from robustkit.engine.evaluation.reliability import Reliability
from robustkit.engine.evaluation.sanity import check_eps
from robustkit.engine.evaluation.verdicts import image_hashes
from robustkit.engine.model.instrumented_model import ExecutionConfig
from robustkit.engine.model.profiling import fastest_batch, measure
from robustkit.engine.model.random_verdicts import is_random
from robustkit.engine.model.tuning import tune
from robustkit.models.failures import described
from robustkit.runs.recorded_outputs import OutputRecord, recorded_call, recording

# Steps on a GPU between two reads of its results, and the most seconds that verdicts wait to be written.
GPU_STEPS_PER_READ = 4
WRITE_EVERY = 5.0
# Robust images are attacked again in float32 if a search in lower precision left less than this share of the clean
# margin.
BORDERLINE_SHARE = 0.05
# Images on which it is tested whether a model is random.
RANDOMNESS_IMAGES = 4


@dataclass
class BlockRunner(BatchRunner):
    """Runs row-wise attacks on blocks of images in the continuous batch; whole batches as its base class does.

    The fields are those of `BatchRunner`.

    Attributes:
        slots: rows of one pass.
        config: how the model is run in a search; None before the first one.
        search_facts: what the run's record says of the searches.
        batch: the images of the search that runs now; None between searches.
        write_every: the most seconds between a verdict and its transaction in the ledger.
    """

    write_every = WRITE_EVERY

    def __post_init__(self) -> None:
        """Prepare; nothing runs yet."""
        super().__post_init__()
        self.reliability = Reliability(
            self.samples,
            self.instrumented,
            self.results,
            self.settings.entries,
            self.store,
            # The name of these recorded outputs, which unfinished runs of earlier versions have.
            self.worker_task("outlook"),
        )
        self.search_facts: dict[str, Any] = {}
        self.config: ExecutionConfig | None = None
        self.batch: ContinuousBatch | None = None
        self.slots = self.settings.slots

    def prepare(self) -> None:
        """Measure the model on one image and test whether it is random; UsageError if eps spans all images."""
        image = self.samples.images([0])
        shape = tuple(image.shape[1:])
        check_eps(self.settings.threat, shape)
        try:
            with own_randomness(self.settings.seed, "prepare"):
                largest = max(self.settings.batch_size, self.slots, self.settings.max_slots)
                measure(self.instrumented, image.to(self.instrumented.device), largest)
                images = self.samples.images(range(min(RANDOMNESS_IMAGES, len(self.samples))))
                with recording(self.store, self.worker_task("prepare")):
                    self.instrumented.random = is_random(
                        partial(recorded_call, self.instrumented.model), images.to(self.instrumented.device)
                    )
        except RobustkitError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise RunError(NO_MEMORY) from error
            raise UsageError(f"the model failed with {described(error)}; correct its code.") from error

    def run_row_wise(self, first: int, count: int, positions: np.ndarray) -> None:
        """Run `count` row-wise attacks from stage `first` on over the images of these that are still robust."""
        waiting = self.results.waiting(first, positions)
        self.progress.stage(self._title(first, count), len(waiting), self.results.robust, self.results.n)

        def admission(taken: Sequence[int]) -> Callable[[int], Admitted]:
            return self._admission(waiting[~np.isin(waiting, taken)])

        if len(waiting):
            for _ in self.run_admitted(first, count, admission, waiting):
                pass

    def _title(self, first: int, count: int) -> str:
        names = self.results.names[first : first + count]
        return names[0] if count == 1 else f"{names[0]} … {names[-1]}"

    def run_admitted(
        self,
        first: int,
        count: int,
        admission: Callable[[Sequence[int]], Callable[[int], Admitted]],
        examples: np.ndarray,
        active: Sequence[tuple[int, RowBatch]] = (),
    ) -> Iterator[None]:
        """Run `count` attacks from stage `first` on, and yield after every read of results from the device.

        A resumed run goes on with the samples that it had started. Arms run in float32. Robust images that a
        search of lower precision left near the boundary are attacked again in float32.

        Args:
            first: the stage of the first attack.
            count: how many attacks.
            admission: from positions that have been started, what admits the next samples of the others.
            examples: positions of images to choose the execution config by.
            active: samples that another worker started: the attack's number among the `count`, and their rows.
        """
        self.search_facts = {"claims_refused": 0, "searched_again": 0, **self.search_facts}
        # The word seeds random numbers, here and in the names of stored tasks: another one would change results.
        with own_randomness(self.settings.seed, "flight", first, *self.worker):
            try:
                self.choose_config(examples)
                float32 = (self.config or self.instrumented.config).in_float32
                arms = self.settings.entries[first - 1].arm
                with recording(self.store, self.task_name(first)) as record:
                    saved = SavedRows.of(record.first(), self, first)
                    near: Mapping[int, np.ndarray] = saved.near
                    if not saved.again:
                        admit = admission([*saved.positions, *near])
                        chosen = self.config or ExecutionConfig(self.instrumented.model)
                        with self.instrumented.using(float32 if arms else chosen):
                            near = yield from self._search(first, count, admit, saved.with_active(active), record)
                        saved = SavedRows(again=bool(near), near=near)
                        record.restart(saved.record([]))
                    if saved.again:
                        self.search_facts["searched_again"] += len(near)
                        admit = self._admission(np.array(sorted(near.keys() - set(saved.positions)), np.int64))
                        with self.instrumented.using(float32):
                            yield from self._search(first, count, admit, saved, record)
                    record.restart()
            except (RobustkitError, TimeUp):
                raise
            except Exception as error:
                title = self._title(first, count)
                raise RunError(f"{title} failed with {described(error)}.") from error

    def task_name(self, first: int) -> str:
        """Return the name under which the samples at the attacks from this stage on are saved."""
        return f"flight-{first}"

    def worker_task(self, task: str) -> str:
        """Return the name under which a task is saved that each worker runs for itself."""
        return "-".join([task, *map(str, self.worker)])

    def unsettled(self, first: int) -> np.ndarray:
        """Return the positions that have no verdict from this stage on."""
        return self.results.waiting(first, np.arange(self.results.n))

    def _search(
        self, first: int, count: int, admit: Callable[[int], Admitted], saved: SavedRows, record: OutputRecord
    ) -> Generator[None, None, dict[int, np.ndarray]]:
        """Run one continuous batch to its end and write its verdicts, but for borderline samples; yield as above.

        Borderline are robust samples that a search of low precision brought within `BORDERLINE_SHARE` of the way
        to the boundary. Boundary attacks are left to the search after it, which is in float32.

        Returns:
            What the borderline samples have cost, by position.
        """
        earlier: Mapping[int, np.ndarray] = saved.near if saved.again else {}
        batch = self.batch = self._continuous_batch(first, count, admit, parallel_jobs=bool(earlier))
        saved.restore_into(batch)
        number = self.results.next_chunk(first)
        begun, finished, done = time.perf_counter() - saved.seconds, list[Finished](), 0
        near = {} if saved.again else dict(saved.near)
        self.instrumented.detached = saved.detached
        clock = Clock()
        for group in batch.run():
            for part in group:
                certain = self._without_borderline(part, earlier, near)
                finished.append(certain)
                done += len(part.position)
            self.progress.advance(done + batch.progress, self.results.robust)
            now = time.perf_counter()
            due = clock.due(now)
            if finished and (due or now - begun > self.write_every or not batch.active or now > self.deadline):
                self._write_finished(first, count, number, finished, now - begun)
                number, begun, finished = number + 1, now, []
            if due and self.store.keeps and batch.active:
                state = SavedRows(
                    saved.again, earlier or near, now - begun, batch.claims_refused, self.instrumented.detached
                )
                record.restart(state.record(batch.record()), on=clock.slow or self.instrumented.random)
                clock.saved(now)
            self._check_deadline()
            yield
        self.batch = None
        self.search_facts["claims_refused"] += batch.claims_refused
        if not (earlier or self.settings.entries[first - 1].arm):
            self.search_facts |= {
                "precision": self.instrumented.precision,
                "layout": self.instrumented.layout,
                "folded": self.instrumented.config.folded,
                "converted_weights": self.instrumented.config.original is not None,
                "rounding": self.instrumented.rounding,
                "slots": batch.slots,
                "occupancy": batch.occupancy,
            }
        return near

    def _continuous_batch(
        self, first: int, count: int, admit: Callable[[int], Admitted], *, parallel_jobs: bool
    ) -> ContinuousBatch:
        entries = self.settings.attacks_from(first, count)
        return ContinuousBatch(
            instrumented=self.instrumented,
            threat=self.settings.threat,
            entries=entries,
            streams=[self._stream(stage) for stage in range(first, first + count)],
            seed=self.settings.seed,
            slots=self.slots,
            admit=admit,
            recover=partial(self._halve_micro_batch, self.slots),
            steps_per_read=1 if ComputeDevice(self.instrumented.device).is_cpu else GPU_STEPS_PER_READ,
            parallel_jobs=parallel_jobs or entries[0].arm,
            suite_views=[entry.view for entry in self.settings.entries],
            end_early=self.settings.end_early,
            deterministic=not (self.instrumented.random or UNSTEADY & self.results.flags.keys()),
        )

    def _without_borderline(
        self, part: Finished, earlier: Mapping[int, np.ndarray], near: dict[int, np.ndarray]
    ) -> Finished:
        """Add what samples cost earlier; move borderline ones to `near` and return the others."""
        for row, position in enumerate(part.position.tolist()):
            part.spent[row] += earlier.get(position, 0)
        borderline = np.zeros(len(part.position), bool)
        if self.instrumented.rounding:
            limit = BORDERLINE_SHARE * self.results.clean_margins[part.position]
            borderline = ~part.judged.fooled.cpu().numpy() & (part.judged.margin.cpu().numpy() < limit)
        near |= dict(zip(part.position[borderline].tolist(), part.spent[borderline], strict=True))
        return part.select(~borderline)

    def choose_config(self, positions: np.ndarray) -> None:
        """Choose how to run the model in row-wise searches, once; batch attacks use the model as it is."""
        if self.config is None:
            instrumented, images = self.instrumented, min(self.slots, self.instrumented.trial_batch)
            x = self.samples.images(positions[:images]).to(instrumented.device)
            with instrumented.using(instrumented.config), own_randomness(self.settings.seed, "tune"):
                before = instrumented.config
                self._choose_slots(x)
                with recording(self.store, self.worker_task("tune")) as record:
                    self.search_facts["trial_images"] = tune(
                        instrumented,
                        x,
                        precision=self.settings.choose_precision,
                        rows=self._rows_of_a_step(),
                        threat=self.settings.threat,
                    )
                    # A resumed run, perhaps on a busier machine, uses the same config.
                    record.write()
                self.config = instrumented.config
                if self.config != before:
                    self._choose_slots(x)

    def _choose_slots(self, x: Images) -> None:
        """Choose how many rows a pass has, where the settings allow more; x are images to time (B C H W)."""
        if self.settings.max_slots > self.slots and self.instrumented.slow_batch is None:
            # More slots than images that wait would stay empty.
            most = min(self.settings.max_slots, max(len(self.unsettled(1)), self.slots))
            self.slots = fastest_batch(self.instrumented, x, self.slots, most)

    def _rows_of_a_step(self) -> int:
        """Return how many rows a step has on average: half of the images if these are few, else all slots."""
        limits = self.instrumented.micro_batch, self.instrumented.slow_batch
        rows = min(self.slots, len(self.unsettled(1)) // 2)
        return max(1, min(rows, *(limit for limit in limits if limit is not None)))

    def _admission(self, waiting: np.ndarray) -> Callable[[int], Admitted]:
        """Return a function that admits up to n of these samples; images are read in batches."""
        device, size = ComputeDevice(self.instrumented.device), self.settings.batch_size
        batches = read_ahead(self.samples, np.split(waiting, range(size, len(waiting), size)))
        read_positions, images = np.zeros(0, np.int64), torch.zeros(0)

        def admit(free: int) -> Admitted:
            nonlocal read_positions, images
            while len(read_positions) < free and (following := next(batches, None)) is not None:
                more, read = following
                self.check_images(more, image_hashes(read))
                images = torch.cat([images, read]) if len(read_positions) else read
                read_positions = np.concatenate([read_positions, more])
            admitted, read_positions = read_positions[:free], read_positions[free:]
            x, images = images[:free], images[free:]
            labels = torch.from_numpy(self.samples.labels[admitted])
            clean = torch.from_numpy(-self.results.clean_margins[admitted])
            nearest = torch.from_numpy(-self.results.margins[admitted])
            host = x, labels, clean, nearest
            x, labels, clean, nearest, ids = retry_in_memory(
                lambda: (*map(device.upload, host), self.ids(admitted)),
                partial(self._halve_micro_batch, self.slots),
                device.device,
            )
            return Admitted(admitted, ids, x, labels, clean, nearest)

        return admit

    def _write_finished(
        self, first: int, count: int, number: int, finished: list[Finished], seconds: float
    ) -> None:
        """Write the verdicts on samples that finished within so many seconds."""
        self.writer.write_finished(first, count, number, finished, seconds)
