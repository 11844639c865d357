"""The unfinished rows of a continuous batch on disk, from which a killed run resumes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from robustkit.engine.batching.continuous_batch import ContinuousBatch
from robustkit.engine.batching.row_batch import RowBatch
from robustkit.engine.evaluation.verdicts import image_hashes

if TYPE_CHECKING:
    from robustkit.engine.evaluation.block_runner import BlockRunner

# Seconds between two saves: the least, and the most where a save takes long; the share of the time for saves.
MIN_SAVE_INTERVAL, MAX_SAVE_INTERVAL, MAX_SAVE_SHARE = 20.0, 40.0, 0.05
# A step of so many seconds is followed by a save, and the model's outputs in the next one are recorded.
LONG_STEP = 1.0


@dataclass(frozen=True)
class SavedRows:
    """A continuous batch between two steps.

    Attributes:
        again: whether it is the second search, in float32, of borderline samples.
        near: what each borderline sample has cost so far, by its position.
        seconds: since verdicts were last written.
        refused: how many claims were not confirmed.
        detached: whether the model's output was found to have no gradient.
        active: rows: the attack's number, whether they wait for other rows of their sample, and the rows.
    """

    again: bool = False
    near: Mapping[int, np.ndarray] = field(default_factory=dict)
    seconds: float = 0.0
    refused: int = 0
    detached: bool = False
    active: Sequence[tuple[int, int, RowBatch]] = ()

    @property
    def positions(self) -> list[int]:
        """The positions of the samples."""
        return [number for *_, batch in self.active for number in batch.host["position"].tolist()]

    def record(self, batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return it as plain values, with these rows (see `ContinuousBatch.record`)."""
        return {
            "again": self.again,
            "near": torch.tensor(list(self.near), dtype=torch.int64),
            "spent": torch.from_numpy(np.stack(list(self.near.values()))) if self.near else torch.zeros(0),
            "seconds": self.seconds,
            "refused": self.refused,
            "detached": self.detached,
            "tables": list(batches),
        }

    @classmethod
    def of(cls, record: Mapping[str, Any] | None, worker: BlockRunner, first: int) -> SavedRows:
        """Return what was saved, without samples that have had a verdict since."""
        if record is None:
            return cls()
        waiting = worker.unsettled(first)
        left = set(waiting.tolist())
        near = zip(record["near"].tolist(), record["spent"].numpy(), strict=True)
        active = []
        for part in record["tables"]:
            position = part["host"]["position"].numpy()
            kept = np.flatnonzero(np.isin(position, waiting))
            if len(kept):
                active.append((part["lane"], part["parked"], _rows_of(part, position, worker).select(kept)))
        return cls(
            record["again"],
            {number: spent for number, spent in near if number in left},
            record["seconds"],
            record["refused"],
            record["detached"],
            active,
        )

    @staticmethod
    def positions_in(record: Mapping[str, Any]) -> set[int]:
        """Return the positions of all samples of a record."""
        rows = [part["host"]["position"] for part in record["tables"]]
        return {position for part in (record["near"], *rows) for position in part.tolist()}

    def with_active(self, active: Sequence[tuple[int, RowBatch]]) -> SavedRows:
        """Return it with more rows, from another continuous batch."""
        more = [(queue, 0, batch) for queue, batch in active]
        return replace(self, active=[*self.active, *more])

    def restore_into(self, batch: ContinuousBatch) -> None:
        """Add the rows to a continuous batch."""
        batch.sequence.claims_refused = self.refused
        for row in self.active:
            batch.restore(*row)


def _rows_of(part: Mapping[str, Any], position: np.ndarray, worker: BlockRunner) -> RowBatch:
    """Return the rows of a record, with their images read from the data again."""
    samples, which = np.unique(position, return_inverse=True)
    images = worker.samples.images(samples)
    worker.check_images(samples, image_hashes(images))
    device, rows = worker.instrumented.device, torch.from_numpy(which)
    labels = torch.from_numpy(worker.samples.labels[position]).to(device)
    x = images[rows].to(device)
    return RowBatch.of(part, worker.ids(position), x, labels, worker.settings.threat)


class Clock:
    """Decides when a continuous batch is saved."""

    def __init__(self) -> None:
        """Start now."""
        self.last = self.step = time.perf_counter()
        self.every, self.slow = MIN_SAVE_INTERVAL, False

    def due(self, now: float) -> bool:
        """Return whether to save after a step that ended now."""
        took, self.step = now - self.step, now
        self.slow = took > LONG_STEP
        return self.slow or now - self.last > self.every

    def saved(self, begun: float) -> None:
        """Note a save that began then and ended now."""
        self.last = self.step = time.perf_counter()
        self.every = min(max((self.last - begun) / MAX_SAVE_SHARE, MIN_SAVE_INTERVAL), MAX_SAVE_INTERVAL)
