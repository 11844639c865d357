"""What a flight has under way, as a killed run's goes on from: rows, what others cost so far, when it is saved."""

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

# Seconds between two saves at least, and at most where one takes long; a save takes this share of the time.
SAVE_EVERY, RARELY, SHARE = 20.0, 40.0, 0.05
# A step that takes so many seconds is followed by a save, and the answers to the next one are recorded.
LONG = 1.0


@dataclass(frozen=True)
class SavedRows:
    """A flight between two steps.

    `again` is whether it is the second search, in float32, of the samples `near` the boundary: what each has cost
    so far by its position. `seconds` are those since verdicts were last written, `aboard` are
    lanes' rows: the lane's number, whether they are parked, and the rows.
    """

    again: bool = False
    near: Mapping[int, np.ndarray] = field(default_factory=dict)
    seconds: float = 0.0
    refused: int = 0
    detached: bool = False
    active: Sequence[tuple[int, int, RowBatch]] = ()

    @property
    def positions(self) -> list[int]:
        """The positions of the samples aboard."""
        return [at for *_, batch in self.active for at in batch.host["position"].tolist()]

    def record(self, batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return it as plain values, with these rows aboard (see `Flight.state`)."""
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
        """Return what was saved, but for samples that have got their verdict since."""
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
                active.append((part["lane"], part["parked"], _table(part, position, worker).select(kept)))
        return cls(
            record["again"],
            {at: spent for at, spent in near if at in left},
            record["seconds"],
            record["refused"],
            record["detached"],
            active,
        )

    @staticmethod
    def positions_in(record: Mapping[str, Any]) -> set[int]:
        """Return the positions of all samples of a record."""
        rows = [part["host"]["position"] for part in record["tables"]]
        return {at for some in (record["near"], *rows) for at in some.tolist()}

    def begin(self, active: Sequence[tuple[int, RowBatch]]) -> SavedRows:
        """Return it with others aboard, from another flight."""
        more = [(queue, 0, batch) for queue, batch in active]
        return replace(self, active=[*self.active, *more])

    def put_aboard(self, batch: ContinuousBatch) -> None:
        """Have a flight go on with it."""
        batch.refused = self.refused
        for row in self.active:
            batch.resume(*row)


def _table(part: Mapping[str, Any], position: np.ndarray, worker: BlockRunner) -> RowBatch:
    """Return the rows of a record, their images read from the data again."""
    samples, which = np.unique(position, return_inverse=True)
    images = worker.samples.images(samples)
    worker.check_images(samples, image_hashes(images))
    device, rows = worker.instrumented.device, torch.from_numpy(which)
    labels = torch.from_numpy(worker.samples.labels[position]).to(device)
    return RowBatch.of(part, worker.ids(position), images[rows].to(device), labels)


class Clock:
    """Says when a flight is to be saved."""

    def __init__(self) -> None:
        """Begin now."""
        self.last = self.step = time.perf_counter()
        self.every, self.slow = SAVE_EVERY, False

    def due(self, now: float) -> bool:
        """Return whether the flight is to be saved, a step having ended now."""
        took, self.step = now - self.step, now
        self.slow = took > LONG
        return self.slow or now - self.last > self.every

    def saved(self, begun: float) -> None:
        """Note that it has been, from then until now."""
        self.last = self.step = time.perf_counter()
        self.every = min(max((self.last - begun) / SHARE, SAVE_EVERY), RARELY)
