"""One attack of a continuous batch and its rows, with those that wait for other rows of their sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from robustkit.attack_api import LoopOptions, RowWise
from robustkit.engine.batching.row_batch import RowBatch
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.registry import SuiteEntry

# At checkpoints that are multiples of this number of queries a row ends if it gained nothing since the one before.
IDLE_QUERIES = 1000


@dataclass
class AttackQueue:
    """One attack of a continuous batch and its rows.

    Attributes:
        attack: what is run.
        view: the view of the model that it uses; empty for the model itself.
        stream: the name of its random numbers.
        number: its position among the batch's attacks, from 0.
        options: the loop's options for it.
        checkpoints: by the number of queries after which a row may end early, the share of the clean margin that
            it must have removed by then.
        parallel_jobs: whether a sample runs all its jobs at once, in a row for each.
        batch: the rows at the attack, if there are any.
        waiting: with parallel jobs, rows that have ended before others of their sample.
    """

    attack: RowWise
    view: str
    stream: str
    number: int
    options: LoopOptions
    parallel_jobs: bool
    checkpoints: Mapping[int, float] = field(default_factory=dict)
    batch: RowBatch | None = None
    waiting: RowBatch | None = None

    @classmethod
    def of(
        cls,
        entry: SuiteEntry,
        stream: str,
        number: int,
        norm: str,
        *,
        parallel_jobs: bool,
        end_early: bool = False,
    ) -> AttackQueue:
        """Return an empty queue for an attack in this norm; boundary attacks always have parallel jobs."""
        options = entry.attack.loop_options(norm)
        parallel_jobs = parallel_jobs or options.boundary_only is not None
        checkpoints = dict(options.checkpoints) if end_early else {}
        return cls(entry.attack, entry.view, stream, number, options, parallel_jobs, checkpoints)

    def steps_to_read(self) -> int:
        """Return how many steps may pass before a row is at a checkpoint or at its end, and must be read."""
        age = self.active.host["age"]
        ends = np.array([self.options.steps + 1, *self.checkpoints])
        ahead = ends[:, None] - age
        return int(ahead[ahead > 0].min())

    def without_hope(self, batch: RowBatch) -> np.ndarray:
        """Return the mask of the rows that may end at a checkpoint.

        These have removed too little of the clean margin, or nothing since a checkpoint `IDLE_QUERIES` before.
        Rows whose margin has not changed at all continue: their model's scores say nothing about a search.
        """
        ages = batch.host["age"]
        required = np.array([self.checkpoints.get(age, 0.0) for age in ages.tolist()])
        if not required.any():
            return np.zeros(len(batch), bool)
        clean, nearest = (part.cpu().numpy() for part in (batch.device["past"][:, 0], batch.device["nearest"]))
        whole, marked = (required > 0) & (ages % IDLE_QUERIES == 0), batch.host["marked"]
        batch.host["marked"] = np.where(whole, nearest, marked)
        hopeless = (nearest - clean < required * -clean) | (whole & (nearest <= marked))
        mask: np.ndarray = (required > 0) & (nearest > clean) & hopeless
        return mask

    @property
    def separate_passes(self) -> bool:
        """Whether its queries cannot share a pass with those of other attacks."""
        return self.options.eot_samples > 1 or self.options.vector_objective or bool(self.view)

    @property
    def active(self) -> RowBatch:
        """The rows, if there are any."""
        assert self.batch is not None  # noqa: S101
        return self.batch

    def jobs(self, instrumented: InstrumentedModel) -> int:
        """Return how many jobs the attack has for each sample: all of them on each part of its view."""
        return self.attempts(instrumented) * (len(instrumented.views[self.view]) if self.view else 1)

    def attempts(self, instrumented: InstrumentedModel) -> int:
        """Return how many jobs it has on one part of its view."""
        return self.options.restarts * min(self.options.targets or 1, max((instrumented.num_classes or 2) - 1, 1))

    def join(self, batch: RowBatch) -> None:
        """Add rows."""
        self.batch = batch if self.batch is None else RowBatch.join([self.batch, batch])

    def finish_jobs(self, ended: RowBatch) -> RowBatch:
        """Return one row for each sample whose jobs have all ended; keep the other ended rows waiting."""
        unfinished = self.batch.host["position"] if self.batch is not None else np.zeros(0, np.int64)
        waiting = np.isin(ended.host["position"], unfinished)
        if waiting.any():
            parts = [ended.select(np.flatnonzero(waiting)), *([self.waiting] if self.waiting is not None else [])]
            self.waiting = RowBatch.join(parts)
        complete = ended.select(np.flatnonzero(~waiting))
        return self.with_waiting(complete, complete.host["position"]).merged() if len(complete) else complete

    def with_waiting(self, batch: RowBatch, samples: np.ndarray) -> RowBatch:
        """Return the rows with the waiting ones of the same samples, which are removed from those waiting."""
        if self.waiting is None:
            return batch
        mask = np.isin(self.waiting.host["position"], samples)
        joined = RowBatch.join([batch, self.waiting.select(np.flatnonzero(mask))])
        self.waiting = self.waiting.select(np.flatnonzero(~mask)) if not mask.all() else None
        return joined
