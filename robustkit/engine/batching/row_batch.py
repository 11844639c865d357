"""Rows of a continuous batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robustkit.attack_api import State

STATE = "state."
# Columns that are read from the data again, and the claim, which is empty between two steps.
FROM_DATA = {"ids", "x", "labels", "claim"}


@dataclass
class RowBatch:
    """Rows of a continuous batch.

    Attributes:
        host: arrays with one entry for each row: the sample's position, its job, the steps taken in it (`age`),
            and the passes spent on each attack.
        device: tensors with one entry for each row: images, labels, best points, claims, the attack's state.
    """

    host: dict[str, np.ndarray]
    device: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.host["position"])

    def select(self, index: np.ndarray) -> RowBatch:
        """Return these rows."""
        there = torch.from_numpy(index).to(self.device["x"].device)
        return RowBatch(
            {name: array[index] for name, array in self.host.items()},
            {name: tensor[there] for name, tensor in self.device.items()},
        )

    def to(self, device: torch.device) -> RowBatch:
        """Return the rows on another device."""
        return RowBatch(self.host, {name: tensor.to(device) for name, tensor in self.device.items()})

    @staticmethod
    def join(batches: Sequence[RowBatch]) -> RowBatch:
        """Return the rows of all."""
        if len(batches) == 1:
            return batches[0]
        return RowBatch(
            {name: np.concatenate([t.host[name] for t in batches]) for name in batches[0].host},
            {name: torch.cat([t.device[name] for t in batches]) for name in batches[0].device},
        )

    def expand(self, jobs: int) -> RowBatch:
        """Return a copy of each row for every job; only the first keeps the cost so far."""
        rows = self.select(np.repeat(np.arange(len(self)), jobs))
        rows.host["job"] = np.tile(np.arange(jobs), len(self))
        rows.host["spent"][rows.host["job"] > 0] = 0
        return rows

    def merged(self) -> RowBatch:
        """Return one row for each sample: the one with the highest margin, with the passes of all of them."""
        order = np.lexsort((-self.device["nearest"].cpu().numpy(), self.host["position"]))
        samples, first = np.unique(self.host["position"][order], return_index=True)
        rows = self.select(order[first])
        rows.host["spent"] = np.stack(
            [self.host["spent"][self.host["position"] == sample].sum(0) for sample in samples]
        )
        broken = [
            self.device["broken"][torch.from_numpy(self.host["position"] == sample)].any() for sample in samples
        ]
        rows.device["broken"] = torch.stack(broken)
        return rows

    def charge_last_attack(self, index: np.ndarray, forwards: int | np.ndarray) -> None:
        """Add forward passes to the cost of the last attack that these rows were in."""
        ran = self.host["spent"][index, :, 0] > 0
        last = np.where(ran.any(1), ran.shape[1] - 1 - ran[:, ::-1].argmax(1), 0)
        self.host["spent"][index, last, 0] += forwards

    def record(self) -> dict[str, dict[str, Tensor]]:
        """Return the columns to save, of rows without claims; those that the data hold are left out."""
        device = {name: tensor.cpu() for name, tensor in self.device.items() if name not in FROM_DATA}
        if torch.equal(device["anchor"], device["best"]):
            del device["anchor"]
        return {"host": {name: torch.from_numpy(array) for name, array in self.host.items()}, "device": device}

    @classmethod
    def of(cls, record: Mapping[str, Mapping[str, Tensor]], ids: Tensor, x: Tensor, labels: Tensor) -> RowBatch:
        """Return the rows of a record, with the columns that the data hold."""
        kept = {name: tensor.to(x.device) for name, tensor in record["device"].items()}
        if (blind := kept.pop(f"{STATE}blind", None)) is not None:  # of runs that were interrupted before
            kept[f"{STATE}needs_gradient"] = ~blind
        device = {"anchor": kept["best"], **kept, "ids": ids, "x": x, "labels": labels, "claim": x}
        return cls({name: tensor.numpy() for name, tensor in record["host"].items()}, device)

    @property
    def state(self) -> State:
        """The attack's own part."""
        return {name[len(STATE) :]: t for name, t in self.device.items() if name.startswith(STATE)}

    def with_state(self, state: State) -> RowBatch:
        """Return the rows with another state of the attack."""
        rest = {name: t for name, t in self.device.items() if not name.startswith(STATE)}
        return RowBatch(self.host, {**rest, **{STATE + name: t for name, t in state.items()}})
