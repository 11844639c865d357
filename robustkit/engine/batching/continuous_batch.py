"""Continuous batching: one batch of slots in which samples go through a sequence of attacks at their own pace.

Every step is one forward and backward pass for all rows that need a gradient, whatever their attack, target or
step number, and one forward pass for the other rows. A point that seems to fool the model is a claim and is
immediately judged in float32: if it is confirmed the sample is finished, else it continues. A sample runs one job
at a time, in an order that depends only on its own results; so its verdict does not depend on the other samples in
the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from robustkit.attack_api import Answer
from robustkit.attack_api.driver import drive
from robustkit.core.threat import ThreatModel
from robustkit.engine.batching.attack_queue import AttackQueue
from robustkit.engine.batching.attack_sequence import AttackSequence
from robustkit.engine.batching.claims import ClaimJudge
from robustkit.engine.batching.forward_passes import Query, Result, deployed_passes, on_members, run_queries
from robustkit.engine.batching.row_batch import RowBatch, columns_of, read_masks
from robustkit.engine.batching.samples import Admitted, Finished
from robustkit.engine.batching.step_results import StepResults
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.registry import SuiteEntry


@dataclass
class ContinuousBatch:
    """Takes samples through consecutive attacks; iterate over `run()`.

    Attributes:
        instrumented: the model.
        threat: the perturbations that are allowed.
        entries: the attacks in the order they are run, all row-wise.
        streams: the name of each attack's random numbers.
        seed: of the run.
        slots: how many rows are in the batch at most.
        admit: from a number n to at most n samples. Fewer mean that there are no more, unless they are marked
            `later`.
        recover: called after a try that ran out of memory; it makes another try possible, or raises RunError.
        steps_per_read: how many steps may pass between two reads of results from the device.
        parallel_jobs: whether a sample runs all jobs of an attack at once, in a row for each, which takes fewer
            steps where samples are few. Boundary attacks always do.
        deterministic: whether the model returns the same logits for the same image each time. An attempt's last
            query is then made in float32 and is the verdict itself.
        suite_views: the views that attacks of the whole suite use.
        end_early: whether an arm may leave a sample at a checkpoint.
    """

    instrumented: InstrumentedModel
    threat: ThreatModel
    entries: Sequence[SuiteEntry]
    streams: Sequence[str]
    seed: int
    slots: int
    admit: Callable[[int], Admitted]
    recover: Callable[[], None]
    steps_per_read: int = 1
    parallel_jobs: bool = False
    deterministic: bool = False
    suite_views: Collection[str] = ()
    end_early: bool = False

    def __post_init__(self) -> None:
        """Create an empty queue for each attack."""
        self.queues = [
            AttackQueue.of(
                entry,
                stream,
                number,
                self.threat.norm,
                parallel_jobs=self.parallel_jobs,
                end_early=self.end_early and entry.arm,
            )
            for number, (entry, stream) in enumerate(zip(self.entries, self.streams, strict=True))
        ]
        judge = ClaimJudge(self.instrumented, self.threat, self.recover)
        self.sequence = AttackSequence(
            self.instrumented, self.threat, self.queues, judge, self.seed, self.suite_views
        )
        self.columns = StepResults(self.threat)
        self.more_samples = True
        # Steps while samples were waiting, and the slots in use at them.
        self._steps = self._slots_used = 0

    @property
    def active(self) -> int:
        """How many rows are in the batch."""
        return sum(len(queue.batch) for queue in self.queues if queue.batch is not None)

    @property
    def claims_refused(self) -> int:
        """How many claims were not confirmed."""
        return self.sequence.claims_refused

    @property
    def progress(self) -> float:
        """The unfinished samples' progress, in whole samples, by the attack that each is at."""
        counts = ((queue, len(np.unique(queue.batch.host["position"]))) for queue in self.queues if queue.batch)
        return sum((queue.number + 0.5) / len(self.queues) * samples for queue, samples in counts)

    @property
    def occupancy(self) -> float | None:
        """The mean share of slots in use while samples were waiting; None if none ever was."""
        return self._slots_used / (self._steps * self.slots) if self._steps else None

    def run(self) -> Iterator[list[Finished]]:
        """Yield the samples that have finished since, after every read from the device, until all have.

        While more may come it yields empty lists.
        """
        while True:
            self._admit_samples()
            busy = [queue for queue in self.queues if queue.batch is not None]
            if busy:
                nearest = min(queue.steps_to_read() for queue in busy)
                drive(busy, min(self.steps_per_read, nearest), self._query, self._step)
                claims = self.columns.columns([queue.active for queue in busy])["when"]
                self.sequence.end_steps(busy, claims.cpu().numpy())
            finished = self.sequence.take_finished()
            yield finished
            if not busy and not finished and not self.more_samples:
                return

    def _admit_samples(self) -> None:
        """Fill free slots with new samples and start the first attack on them."""
        while self.more_samples and (free := self.slots - self.active) > 0:
            position, ids, x, labels, clean, nearest, later = self.admit(free)
            self.more_samples = later or len(position) == free
            if not len(position):
                return
            clean, nearest = clean.double(), nearest.double()
            lowest = torch.full_like(clean, -torch.inf)
            most = max(queue.options.targets for queue in self.queues)
            tensors = {
                **columns_of(x, labels, ids, self.threat),
                "past": torch.stack([clean, nearest], 1),
                "nearest": clean,
                "best": x,
                "anchor": x,
                "refused": lowest,
                "broken": torch.zeros_like(lowest, dtype=torch.bool),
                "claim_logits": x.new_full((len(x), self.instrumented.num_classes or 2), torch.nan),
                "ranked": labels.new_full((len(x), min(most, (self.instrumented.num_classes or 2) - 1)), -1),
            }
            zero = np.zeros(len(position), np.int64)
            spent = np.zeros((len(position), len(self.queues), 2), np.int64)
            host = {"position": position, "job": zero, "age": zero, "ended": zero > 0, "spent": spent}
            host["marked"] = np.full(len(position), -np.inf)
            self.sequence.start_attack(0, RowBatch(host, tensors))
            if later and len(position) < free:
                return

    def record(self) -> list[dict[str, Any]]:
        """Return a record of each attack's rows, and of its waiting ones, between two steps."""
        # The keys `lane` (the attack) and `parked` (rows that wait for others) are those of stored records.
        rows = [(queue.number, *pair) for queue in self.queues for pair in enumerate((queue.batch, queue.waiting))]
        return [
            {"lane": number, "parked": waiting, **batch.record()}
            for number, waiting, batch in rows
            if batch is not None
        ]

    def restore(self, number: int, waiting: int, batch: RowBatch) -> None:
        """Add the rows of a record to an attack, or to its waiting rows."""
        queue = self.queues[number]
        if waiting:
            queue.waiting = batch
        else:
            queue.join(self.sequence.with_target(queue, batch))

    def give_half(self) -> list[tuple[int, RowBatch]]:
        """Remove and return every second sample that is within its attack, but none with parallel jobs."""
        given = []
        for queue in self.queues:
            if queue.batch is None or queue.parallel_jobs or len(queue.batch) < 2:
                continue
            rows = np.arange(len(queue.batch))
            given.append((queue.number, queue.batch.select(rows[1::2])))
            queue.batch = queue.batch.select(rows[::2])
        return given

    def _query(self, number: int, queues: Sequence[AttackQueue]) -> list[Result]:
        """Return an answer for every row with the model's own logits, in as few passes as can be shared."""
        if self.more_samples:
            self._steps += 1
            self._slots_used += self.active
        batches = [queue.active for queue in queues]
        read_masks(batches)

        def work() -> list[Result]:
            queries = [
                Query.of(queue, batch, self.sequence.rows(queue, batch), deterministic=self.deterministic)
                for queue, batch in zip(queues, batches, strict=True)
            ]
            return run_queries(queries, self.instrumented)

        return self.sequence.judge.retry(work)

    def _step(self, number: int, queues: list[AttackQueue], results: list[Result]) -> list[AttackQueue]:
        """Count the passes, note best points and claims, and take a step of every row."""
        batches = self.sequence.judge.retry(lambda: self._stepped(number, results))
        for queue, result, batch in zip(queues, results, batches, strict=True):
            self._count_passes(result.query, result.answer)
            queue.batch = batch
        return queues

    def _stepped(self, number: int, results: Sequence[Result]) -> list[RowBatch]:
        """Return the rows of all attacks after a step; the queries' rows are not changed."""
        columns = self.columns.noted(results, number, self.instrumented.rounding)
        batches = []
        for result in results:
            before = result.query.batch
            ended = before.host["ended"] | before.masks.get("last", False)
            host = {**before.host, "age": before.host["age"] + 1, "ended": ended}
            batches.append(RowBatch(host, dict(before.device), before.masks))
        self.columns.keep(batches, columns)
        for place, (result, batch) in enumerate(zip(results, batches, strict=True)):
            query = result.query
            rows = self.sequence.rows(query.queue, batch)
            batches[place] = batch.with_state(query.queue.attack.step(rows, query.state, result.answer))
        return batches

    def _count_passes(self, query: Query, answer: Answer) -> None:
        """Add the passes that an answer took to each row's cost."""
        queue, spent = query.queue, query.batch.host["spent"]
        passes = queue.options.eot_samples * np.array(self.instrumented.passes(queue.view))
        if queue.view:
            passes = passes[query.batch.host["job"] // queue.attempts(self.instrumented)]
        columns = answer.loss.shape[1:].numel()
        spent[:, queue.number, 0] += passes
        if not on_members(queue, self.instrumented):
            spent[:, queue.number, 0] += deployed_passes(queue.view, random=self.instrumented.random)
        spent[:, queue.number, 1] += query.needs_gradient * passes * columns
