"""One attack of a flight and the rows that are at it, those that wait for others of their sample among them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from robustkit.attack_api import LoopOptions, RowWise
from robustkit.engine.batching.row_batch import RowBatch
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.registry import SuiteEntry


@dataclass
class AttackQueue:
    """One attack of the flight and the rows that are at it.

    Where it is `wide` a sample does all its jobs at once, a row for each; rows that end before their sample's
    others are `parked`.
    """

    attack: RowWise
    view: str
    stream: str
    number: int
    options: LoopOptions
    wide: bool
    batch: RowBatch | None = None
    parked: RowBatch | None = None

    @property
    def solo(self) -> bool:
        """Whether its queries are of a kind that cannot share a pass with others."""
        return self.options.eot_samples > 1 or self.options.vector_objective or bool(self.view)

    @classmethod
    def of(cls, entry: SuiteEntry, stream: str, number: int, norm: str, *, wide: bool) -> AttackQueue:
        """Return an empty one for an attack in this norm; last resorts are `wide` whatever is said."""
        options = entry.attack.loop_options(norm)
        wide = wide or options.boundary_only is not None
        return cls(entry.attack, entry.view, stream, number, options, wide)

    @property
    def active(self) -> RowBatch:
        """The rows, where there are some."""
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

    def complete(self, ended: RowBatch) -> RowBatch:
        """Park rows whose samples have others under way still; return the samples that are through, folded."""
        under_way = self.batch.host["position"] if self.batch is not None else np.zeros(0, np.int64)
        waiting = np.isin(ended.host["position"], under_way)
        if waiting.any():
            parts = [ended.select(np.flatnonzero(waiting)), *([self.parked] if self.parked is not None else [])]
            self.parked = RowBatch.join(parts)
        through = ended.select(np.flatnonzero(~waiting))
        return self.with_parked(through, through.host["position"]).folded() if len(through) else through

    def with_parked(self, batch: RowBatch, samples: np.ndarray) -> RowBatch:
        """Return the rows with those of the same samples that were parked, which are parked no more."""
        if self.parked is None:
            return batch
        mine = np.isin(self.parked.host["position"], samples)
        joined = RowBatch.join([batch, self.parked.select(np.flatnonzero(mine))])
        self.parked = self.parked.select(np.flatnonzero(~mine)) if not mine.all() else None
        return joined
