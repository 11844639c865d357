"""Continuous batching: one batch of slots in which samples go through a sequence of attacks at their own pace.

Every step is one forward and backward pass for all rows that need a gradient, whatever their attack, target or
step number, and one forward pass for the other rows. A point that seems to fool the model is a claim and is
immediately judged in float32: if it is confirmed the sample is finished, else it continues. A sample runs one job
at a time, in an order that depends only on its own results; so its verdict does not depend on the other samples in
the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustkit.attack_api import Answer, Rows, rank
from robustkit.attack_api.driver import drive
from robustkit.core import criteria
from robustkit.core.criteria import Goal
from robustkit.core.devices import ComputeDevice
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Logits
from robustkit.core.threat import ThreatModel, per_row
from robustkit.engine.batching.attack_queue import AttackQueue
from robustkit.engine.batching.claims import ClaimJudge
from robustkit.engine.batching.forward_passes import Query, deployed_passes, on_members, run_queries
from robustkit.engine.batching.row_batch import RowBatch
from robustkit.engine.batching.samples import Admitted, Finished
from robustkit.engine.evaluation.verdicts import Verdicts
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.gradient_views.discovery import is_applicable
from robustkit.registry import SuiteEntry

Results = list[tuple[Query, Answer, Logits]]


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
        claims_refused: how many claims were not confirmed.
        finished: samples with a verdict that `run` has not yielded yet.
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
    claims_refused: int = 0
    finished: list[Finished] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Create an empty queue for each attack."""
        self.queues = [
            AttackQueue.of(entry, stream, number, self.threat.norm, parallel_jobs=self.parallel_jobs)
            for number, (entry, stream) in enumerate(zip(self.entries, self.streams, strict=True))
        ]
        self.judge = ClaimJudge(self.instrumented, self.threat, self.recover)
        self.more_samples = True
        # Steps while samples were waiting, and the slots in use at them.
        self._steps = self._slots_used = 0

    @property
    def active(self) -> int:
        """How many rows are in the batch."""
        return sum(len(queue.batch) for queue in self.queues if queue.batch is not None)

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
                nearest = min(int((queue.options.steps - queue.active.host["age"]).min()) for queue in busy) + 1
                drive(busy, min(self.steps_per_read, nearest), self._query, self._step)
                self._judge_claims(busy)
            finished, self.finished = self.finished, []
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
                "ids": ids,
                "x": x,
                "labels": labels,
                "past": torch.stack([clean, nearest], 1),
                "nearest": clean,
                "best": x,
                "anchor": x,
                "refused": lowest,
                "claimed": torch.zeros_like(lowest, dtype=torch.bool),
                "when": torch.zeros_like(lowest, dtype=torch.int64),
                "ended": torch.zeros_like(lowest, dtype=torch.bool),
                "broken": torch.zeros_like(lowest, dtype=torch.bool),
                "claim": x,
                "claim_logits": x.new_full((len(x), self.instrumented.num_classes or 2), torch.nan),
                "ranked": labels.new_full((len(x), min(most, (self.instrumented.num_classes or 2) - 1)), -1),
            }
            zero = np.zeros(len(position), np.int64)
            spent = np.zeros((len(position), len(self.queues), 2), np.int64)
            self._start_attack(
                0, RowBatch({"position": position, "job": zero, "age": zero, "spent": spent}, tensors)
            )
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
        if waiting:
            self.queues[number].waiting = batch
        else:
            self.queues[number].join(batch)

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

    def _start_attack(self, number: int, batch: RowBatch) -> None:
        """Start the attack of that number on these samples, or a later one, or finish them."""
        if number == len(self.queues):
            return self._finish_not_fooled(batch)
        queue = self.queues[number]
        absent = not is_applicable(queue.view, self.instrumented.views, self.suite_views)
        share = queue.options.boundary_only
        chance = queue.options.score_check and self.instrumented.random
        if absent or chance or (share is not None and self.instrumented.rounding):
            return self._start_attack(number + 1, batch)
        self.judge.compare_nearest(batch)
        clean, past = batch.device["past"].unbind(1)
        batch.device["past"] = torch.stack([clean, torch.maximum(past, batch.device["nearest"])], 1)
        batch.host["job"] = np.zeros(len(batch), np.int64)
        near = None if share is None else self._rows(queue, batch.with_state({})).near_boundary(share)
        if near is not None:
            mask = near.cpu().numpy()
            if not mask.all():
                self._start_attack(number + 1, batch.select(np.flatnonzero(~mask)))
                batch = batch.select(np.flatnonzero(mask))
        if not len(batch):
            return None
        if queue.options.targets and bool((batch.device["ranked"][:, 0] < 0).any()):
            logits = self.judge.retry(lambda: self.instrumented.logits_fp32(batch.device["x"]))
            batch.device["ranked"] = rank(logits, batch.device["labels"], batch.device["ranked"].shape[1])
            batch.host["spent"][:, number, 0] += 1
        self._start_jobs(queue, batch.expand(queue.jobs(self.instrumented)) if queue.parallel_jobs else batch)
        return None

    def _start_jobs(self, queue: AttackQueue, batch: RowBatch) -> None:
        """Start a job of each row."""
        batch.host["age"] = np.zeros(len(batch), np.int64)
        batch.device["ended"] = torch.zeros_like(batch.device["ended"])
        batch = batch.with_state({})
        batch = batch.with_state(queue.attack.init(self._rows(queue, batch)))
        queue.join(batch)

    def _rows(self, queue: AttackQueue, batch: RowBatch) -> Rows:
        part, job = batch.device, batch.host["job"]
        goal = Goal(part["labels"])
        aim = goal
        if queue.options.targets:
            target = torch.from_numpy(job % queue.attempts(self.instrumented) // queue.options.restarts)
            target = ComputeDevice(part["x"].device).upload(target)
            aim = Goal(part["labels"], part["ranked"].gather(1, target[:, None])[:, 0])
        restart, step = torch.from_numpy(job), torch.from_numpy(batch.host["age"])
        rng = RowRng(self.seed, queue.stream, part["ids"], restart=restart, step=step)
        return Rows(part["x"], goal, self.threat, rng, aim, part["past"], part["best"])

    def _query(self, number: int, queues: Sequence[AttackQueue]) -> Results:
        """Return an answer for every row with the model's own logits, in as few passes as can be shared."""
        if self.more_samples:
            self._steps += 1
            self._slots_used += self.active

        batches = [queue.active for queue in queues]

        def work() -> Results:
            queries = [
                Query.of(queue, batch, self._rows(queue, batch), deterministic=self.deterministic)
                for queue, batch in zip(queues, batches, strict=True)
            ]
            return run_queries(queries, self.instrumented)

        return self.judge.retry(work)

    def _step(self, number: int, queues: list[AttackQueue], results: Results) -> list[AttackQueue]:
        """Count the passes, note claims, and take a step of every row."""
        stepped = self.judge.retry(lambda: [self._stepped(*result) for result in results])
        for (query, answer, _), batch in zip(results, stepped, strict=True):
            self._count_passes(query, answer)
            query.queue.batch = batch
        return queues

    def _stepped(self, query: Query, answer: Answer, logits: Logits) -> RowBatch:
        """Return the rows of a query after a step, with their claims; the query's rows are not changed."""
        host = query.batch.host
        batch = RowBatch({**host, "age": host["age"] + 1}, self._with_answers(query, logits))
        return batch.with_state(query.queue.attack.step(self._rows(query.queue, batch), query.state, answer))

    def _count_passes(self, query: Query, answer: Answer) -> None:
        """Add the passes that an answer took to each row's cost."""
        queue = query.queue
        spent, job = query.batch.host["spent"], query.batch.host["job"]
        part = job // queue.attempts(self.instrumented) if queue.view else 0 * job
        passes = queue.options.eot_samples * np.array(self.instrumented.passes(queue.view))[part]
        spent[:, queue.number, 0] += passes
        if not on_members(queue, self.instrumented):
            spent[:, queue.number, 0] += deployed_passes(queue.view, random=self.instrumented.random)
        spent[:, queue.number, 1] += np.where(query.needs_gradient.numpy(), passes * answer.loss[0].numel(), 0)

    def _with_answers(self, query: Query, logits: Logits) -> dict[str, Tensor]:
        """Return the rows' tensors with each row's best point by the model's own logits (B K), and its claim."""
        queue, exact = query.queue, query.exact.to(logits.device)
        part, state = dict(query.batch.device), query.state
        margin = criteria.margin(logits, part["labels"]).double()
        if queue.options.queries_outside_ball:
            margin = torch.where(self.threat.contains(state["x"], part["x"]), margin, -torch.inf)
        nearer = margin > part["nearest"]
        part["best"] = torch.where(per_row(nearer, part["x"]), state["x"], part["best"])
        part["nearest"] = torch.where(nearer, margin, part["nearest"])
        part["broken"] = part["broken"] | ~logits.isfinite().all(1)
        # A search in low precision may not see that a point fools the float32 model.
        tolerance = torch.where(exact, 0, self.instrumented.rounding * logits.abs().amax(1).double())
        seems = Goal(part["labels"]).reached(logits) & (margin > -torch.inf) | (margin > -tolerance)
        claims = seems & (margin > part["refused"]) & ~part["claimed"] & ~part["ended"]
        part["claim"] = torch.where(per_row(claims, part["x"]), state["x"], part["claim"])
        answers = torch.where(exact[:, None], logits, torch.nan)
        part["claim_logits"] = torch.where(claims[:, None], answers, part["claim_logits"])
        part["claimed"] = part["claimed"] | claims
        age = torch.from_numpy(query.batch.host["age"]).to(claims.device)
        part["when"] = torch.where(claims, age, part["when"])
        if "last" in state:
            part["ended"] = part["ended"] | state["last"]
        return part

    def _judge_claims(self, queues: Sequence[AttackQueue]) -> None:
        """Judge the claims; finish the fooled samples, and start the next job of rows whose job has ended."""
        batches = [queue.active for queue in queues]
        claims = [batch.device["claimed"].cpu().numpy().nonzero()[0] for batch in batches]
        claimed = [batch.select(index) for batch, index in zip(batches, claims, strict=True)]
        moves: list[tuple[int, RowBatch]] = []
        verdicts = self.judge.judge_claims(claimed)
        for queue, batch, index, judged in zip(queues, batches, claims, verdicts, strict=True):
            if judged is None:
                gone = np.zeros(len(batch.host["position"]), bool)
            else:
                gone = self._settle_claims(queue, batch, index, judged)
            leaving = self._end_jobs(queue, batch, gone)
            if leaving is not None and len(leaving):
                moves.append((queue.number + 1, leaving))
        for number, batch in moves:
            self._start_attack(number, batch)

    def _settle_claims(
        self, queue: AttackQueue, batch: RowBatch, index: np.ndarray, judged: Verdicts
    ) -> np.ndarray:
        """Finish samples whose claim is confirmed, clear other claims; return the mask of the rows that leave."""
        batch.host["spent"][index, queue.number, 0] += judged.forwards.cpu().numpy()
        fooled = judged.fooled.cpu().numpy()
        refused = torch.from_numpy(index[~fooled]).to(batch.device["x"].device)
        self.claims_refused += len(refused)
        part = batch.device
        part["refused"][refused] = part["nearest"][refused]
        part["claimed"] = torch.zeros_like(part["claimed"])
        if fooled.any():
            return self._finish_fooled(queue, batch, index[fooled], judged.select(fooled))
        return np.zeros(len(batch), bool)

    def _end_jobs(self, queue: AttackQueue, batch: RowBatch, gone: np.ndarray) -> RowBatch | None:
        """Remove rows that are `gone`, start the next job of rows whose job ended, return those without one."""
        done = (batch.host["age"] > queue.options.steps) | batch.device["ended"].cpu().numpy()
        over = done & ~gone
        if not (gone | over).any():
            return None
        jobs = 0 if queue.parallel_jobs else queue.jobs(self.instrumented)
        following = over & (batch.host["job"] + 1 < jobs)
        staying = ~(gone | over)
        queue.batch = batch.select(np.flatnonzero(staying)) if staying.any() else None
        if following.any():
            next_job = batch.select(np.flatnonzero(following))
            next_job.host["job"] = next_job.host["job"] + 1
            self._start_jobs(queue, next_job)
        if not (over & ~following).any():
            return None
        leaving = batch.select(np.flatnonzero(over & ~following)).with_state({})
        return queue.finish_jobs(leaving) if queue.parallel_jobs else leaving

    def _finish_fooled(
        self, queue: AttackQueue, batch: RowBatch, index: np.ndarray, judged: Verdicts
    ) -> np.ndarray:
        """Finish the fooled rows' samples, each by its earliest claim; return the mask of the rows that leave."""
        position, claimed = batch.host["position"], batch.device["when"].cpu().numpy()[index]
        order = np.lexsort((batch.host["job"][index], claimed, position[index]))
        samples, first = np.unique(position[index][order], return_index=True)
        winners = order[first]
        mask = np.zeros(len(index), bool)
        mask[winners] = True
        fooled = batch.select(index[mask])
        gone = np.isin(position, samples)
        if queue.parallel_jobs:
            every = queue.with_waiting(batch.select(np.flatnonzero(gone)).with_state({}), samples).merged()
            columns = np.searchsorted(every.host["position"], fooled.host["position"])
            fooled.host["spent"] = every.host["spent"][columns]
        self._finish(fooled, queue.number, self.judge.refine(queue, fooled, judged.select(mask)))
        return gone

    def _finish_not_fooled(self, batch: RowBatch) -> None:
        """Finish samples that no attack has fooled, judged at their best points."""
        self.judge.compare_nearest(batch)
        self._finish(batch, len(self.queues) - 1, self.judge.judge_best(batch))

    def _finish(self, batch: RowBatch, stage: int, judged: Verdicts) -> None:
        if len(batch):
            stages = np.full(len(batch), stage)
            labels = batch.device["labels"].cpu().numpy()
            judged = replace(judged, broken=judged.broken | batch.device["broken"] & ~judged.fooled)
            if self.instrumented.random:
                judged = replace(judged, refused=~judged.fooled & (batch.device["refused"] > -torch.inf))
            self.finished.append(Finished(batch.host["position"], labels, stages, batch.host["spent"], judged))
