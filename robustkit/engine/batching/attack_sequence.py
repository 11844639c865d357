"""The way of rows through the attacks: from job to job, from attack to attack, and out with a verdict."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from robustkit.attack_api import Rows, rank
from robustkit.core.criteria import Goal
from robustkit.core.rng import RowRng
from robustkit.core.threat import ThreatModel
from robustkit.engine.batching.attack_queue import AttackQueue
from robustkit.engine.batching.claims import ClaimJudge
from robustkit.engine.batching.row_batch import RowBatch
from robustkit.engine.batching.samples import Finished
from robustkit.engine.evaluation.verdicts import Verdicts
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.gradient_views.discovery import is_applicable

# What is read of a row to judge its claim.
CLAIM_COLUMNS = ("x", "labels", "claim", "claim_logits")


@dataclass
class AttackSequence:
    """Starts attacks and their jobs on rows, ends them, and finishes samples.

    Attributes:
        instrumented: the model.
        threat: the perturbations that are allowed.
        queues: the attacks, in the order they are run.
        judge: judges claims and best points.
        seed: of the run.
        suite_views: the views that attacks of the whole suite use.
        claims_refused: how many claims were not confirmed.
        finished: samples with a verdict that have not been taken yet.
    """

    instrumented: InstrumentedModel
    threat: ThreatModel
    queues: Sequence[AttackQueue]
    judge: ClaimJudge
    seed: int
    suite_views: Collection[str]
    claims_refused: int = 0
    finished: list[Finished] = field(default_factory=list)

    def take_finished(self) -> list[Finished]:
        """Return the samples that have finished since the last call."""
        finished, self.finished = self.finished, []
        return finished

    def start_attack(self, number: int, batch: RowBatch) -> None:
        """Start the attack of that number on these samples, or a later one, or finish them."""
        if number == len(self.queues):
            return self._finish_not_fooled(batch)
        queue = self.queues[number]
        absent = not is_applicable(queue.view, self.instrumented.views, self.suite_views)
        share = queue.options.boundary_only
        chance = queue.options.score_check and self.instrumented.random
        if absent or chance or (share is not None and self.instrumented.rounding):
            return self.start_attack(number + 1, batch)
        self.judge.compare_nearest(batch)
        clean, past = batch.device["past"].unbind(1)
        batch.device["past"] = torch.stack([clean, torch.maximum(past, batch.device["nearest"])], 1)
        batch.host["job"] = np.zeros(len(batch), np.int64)
        near = None if share is None else self.rows(queue, batch.with_state({})).near_boundary(share)
        if near is not None:
            mask = near.cpu().numpy()
            if not mask.all():
                self.start_attack(number + 1, batch.select(np.flatnonzero(~mask)))
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
        batch.host["ended"] = np.zeros(len(batch), bool)
        batch.host["marked"] = np.full(len(batch), -np.inf)
        batch = self.with_target(queue, batch.with_state({}))
        queue.join(batch.with_state(queue.attack.init(self.rows(queue, batch))))

    def with_target(self, queue: AttackQueue, batch: RowBatch) -> RowBatch:
        """Return the rows with the target of their job, if the attack tries several."""
        if not queue.options.targets:
            return batch
        number = batch.host["job"] % queue.attempts(self.instrumented) // queue.options.restarts
        target = batch.device["ranked"].gather(1, batch.upload(number)[:, None])[:, 0]
        return RowBatch(batch.host, {**batch.device, "target": target}, batch.masks)

    def rows(self, queue: AttackQueue, batch: RowBatch) -> Rows:
        """Return what an attack knows of its rows; job and age stay on the host."""
        part, goal = batch.device, Goal(batch.device["labels"])
        aim = Goal(part["labels"], part["target"]) if queue.options.targets else goal
        restart, step = torch.from_numpy(batch.host["job"]), torch.from_numpy(batch.host["age"])
        rng = RowRng(self.seed, queue.stream, part["ids"], restart=restart, step=step)
        bounds = (part["low"], part["high"]) if "low" in part else None
        return Rows(part["x"], goal, self.threat, rng, aim, part["past"], part["best"], bounds)

    def end_steps(self, queues: Sequence[AttackQueue], when: np.ndarray) -> None:
        """Judge the claims; finish the fooled samples, and start the next job of rows whose job has ended.

        Args:
            queues: the attacks with rows.
            when: the step of each row's claim (B), -1 for none, over all queues.
        """
        batches = [queue.active for queue in queues]
        claims = np.split(when, np.cumsum([len(batch) for batch in batches])[:-1])
        gone = self._judge_claims(queues, batches, claims)
        leaving = [self._end_jobs(*part) for part in zip(queues, batches, gone, strict=True)]
        for queue, batch in zip(queues, leaving, strict=True):
            if batch is not None and len(batch):
                self.start_attack(queue.number + 1, batch)

    def _judge_claims(
        self, queues: Sequence[AttackQueue], batches: Sequence[RowBatch], claims: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        """Finish samples whose claim is confirmed, clear other claims; return masks of the rows that leave."""
        gone = [np.zeros(len(batch), bool) for batch in batches]
        claimed = [(number, np.flatnonzero(when >= 0)) for number, when in enumerate(claims) if when.max() >= 0]
        if not claimed:
            return gone
        judged, fooled, forwards = self.judge.judge_claims(
            [batches[number].select(index, CLAIM_COLUMNS) for number, index in claimed]
        )
        start = 0
        for number, index in claimed:
            queue, batch = queues[number], batches[number]
            own = np.arange(start, start + len(index))
            start += len(index)
            batch.host["spent"][index, queue.number, 0] += forwards[own]
            self._refuse(batch, index[~fooled[own]])
            if fooled[own].any():
                index, verdicts = index[fooled[own]], judged.select(own[fooled[own]])
                gone[number] = self._finish_fooled(queue, batch, index, claims[number][index], verdicts)
        return gone

    def _refuse(self, batch: RowBatch, index: np.ndarray) -> None:
        """Clear the claims of these rows; only points with a higher margin are claimed from now on."""
        self.claims_refused += len(index)
        if len(index):
            there, part = batch.upload(index), batch.device
            part["refused"].index_copy_(0, there, part["nearest"][there])
            part["when"].index_fill_(0, there, -1)

    def _end_jobs(self, queue: AttackQueue, batch: RowBatch, gone: np.ndarray) -> RowBatch | None:
        """Remove rows that are `gone`, start the next job of rows whose job ended, return those without one."""
        done = (batch.host["age"] > queue.options.steps) | batch.host["ended"]
        over = (done | queue.without_hope(batch)) & ~gone
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
        self, queue: AttackQueue, batch: RowBatch, index: np.ndarray, when: np.ndarray, judged: Verdicts
    ) -> np.ndarray:
        """Finish the fooled rows' samples, each by its earliest claim; return the mask of the rows that leave."""
        position = batch.host["position"]
        order = np.lexsort((batch.host["job"][index], when, position[index]))
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
