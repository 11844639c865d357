"""Rows of a continuous batch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from robustkit.attack_api import State
from robustkit.core.devices import ComputeDevice
from robustkit.core.shapes import Images
from robustkit.core.threat import ThreatModel

STATE = "state."
# Columns that follow from the data or from others, and the claim, which is empty between two steps.
NOT_STORED = {"ids", "x", "labels", "low", "high", "target", "claim", "when"}
# Columns that records of earlier versions have.
OBSOLETE = {"claimed", "ended", "state.blind"}
# Parts of a state that the loop reads.
MASKS = ("needs_gradient", "last")


@dataclass
class RowBatch:
    """Rows of a continuous batch.

    Attributes:
        host: arrays with one entry for each row: the sample's position, its job, the steps taken in it (`age`),
            whether the job has ended early, the passes spent on each attack, and the margin that was `marked` at
            a checkpoint.
        device: tensors with one entry for each row: images, labels, best points, claims, the attack's state.
        masks: those of the state's masks that have been read from the device.
    """

    host: dict[str, np.ndarray]
    device: dict[str, Tensor]
    masks: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.host["position"])

    def select(self, index: np.ndarray, names: Collection[str] | None = None) -> RowBatch:
        """Return these rows, by position; with these of the device's columns only, if there are names."""
        there = self.upload(index)
        return RowBatch(
            {name: array[index] for name, array in self.host.items()},
            {name: self.device[name][there] for name in names or self.device},
            {name: array[index] for name, array in self.masks.items()},
        )

    def upload(self, array: np.ndarray) -> Tensor:
        """Return an array of the host on the rows' device."""
        return ComputeDevice(self.device["x"].device).upload(torch.from_numpy(array))

    def to(self, device: torch.device) -> RowBatch:
        """Return the rows on another device."""
        return RowBatch(self.host, {name: tensor.to(device) for name, tensor in self.device.items()})

    @staticmethod
    def join(batches: Sequence[RowBatch]) -> RowBatch:
        """Return the rows of all, with the columns that all have."""
        if len(batches) == 1:
            return batches[0]
        first, *others = batches
        return RowBatch(
            {name: np.concatenate([t.host[name] for t in batches]) for name in first.host},
            {
                name: torch.cat([t.device[name] for t in batches])
                for name in first.device
                if all(name in t.device for t in others)
            },
            {
                name: np.concatenate([t.masks[name] for t in batches])
                for name in first.masks
                if all(name in t.masks for t in others)
            },
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
        samples, first, which = np.unique(self.host["position"][order], return_index=True, return_inverse=True)
        rows = self.select(order[first])
        spent = np.zeros((len(samples), *self.host["spent"].shape[1:]), np.int64)
        np.add.at(spent, which, self.host["spent"][order])
        rows.host["spent"] = spent
        count = self.device["labels"].new_zeros(len(samples))
        broken = self.device["broken"].to(count.dtype)[self.upload(order)]
        rows.device["broken"] = count.index_add(0, self.upload(which), broken) > 0
        return rows

    def charge_last_attack(self, index: np.ndarray, forwards: int | np.ndarray) -> None:
        """Add forward passes to the cost of the last attack that these rows were in."""
        ran = self.host["spent"][index, :, 0] > 0
        last = np.where(ran.any(1), ran.shape[1] - 1 - ran[:, ::-1].argmax(1), 0)
        self.host["spent"][index, last, 0] += forwards

    def record(self) -> dict[str, dict[str, Tensor]]:
        """Return the columns to save, of rows without claims; those that follow from the data are left out."""
        device = {name: tensor.cpu() for name, tensor in self.device.items() if name not in NOT_STORED}
        if torch.equal(device["anchor"], device["best"]):
            del device["anchor"]
        return {"host": {name: torch.from_numpy(array) for name, array in self.host.items()}, "device": device}

    @classmethod
    def of(
        cls,
        record: Mapping[str, Mapping[str, Tensor]],
        ids: Tensor,
        x: Tensor,
        labels: Tensor,
        threat: ThreatModel,
    ) -> RowBatch:
        """Return the rows of a record, with the columns that follow from the data."""
        kept = {name: tensor.to(x.device) for name, tensor in record["device"].items()}
        if (blind := kept.get(f"{STATE}blind")) is not None:  # of runs that were interrupted before
            kept[f"{STATE}needs_gradient"] = ~blind
        kept = {name: tensor for name, tensor in kept.items() if name not in OBSOLETE}
        device = {"anchor": kept["best"], **kept, **columns_of(x, labels, ids, threat)}
        host = {name: tensor.numpy() for name, tensor in record["host"].items()}
        return cls({"ended": np.zeros(len(x), bool), "marked": np.full(len(x), -np.inf), **host}, device)

    @property
    def state(self) -> State:
        """The attack's own part."""
        return {name[len(STATE) :]: t for name, t in self.device.items() if name.startswith(STATE)}

    def with_state(self, state: State) -> RowBatch:
        """Return the rows with another state of the attack; masks that are the same tensors stay read."""
        rest = {name: t for name, t in self.device.items() if not name.startswith(STATE)}
        masks = {
            name: mask for name, mask in self.masks.items() if state.get(name) is self.device.get(STATE + name)
        }
        return RowBatch(self.host, {**rest, **{STATE + name: t for name, t in state.items()}}, masks)


def columns_of(x: Images, labels: Tensor, ids: Tensor, threat: ThreatModel) -> dict[str, Tensor]:
    """Return the columns that follow from the data alone, without a claim."""
    columns = {"ids": ids, "x": x, "labels": labels, "claim": x, "when": torch.full_like(labels, -1)}
    bounds = threat.bounds(x)
    return columns if bounds is None else columns | {"low": bounds[0], "high": bounds[1]}


def read_masks(batches: Sequence[RowBatch]) -> None:
    """Read the states' masks that have changed, all in one copy from the device."""
    unread = [
        (batch, name)
        for batch in batches
        for name in MASKS
        if STATE + name in batch.device and name not in batch.masks
    ]
    if not unread:
        return
    values = torch.cat([batch.device[STATE + name] for batch, name in unread]).cpu().numpy()
    sizes = np.cumsum([len(batch) for batch, _ in unread])
    for (batch, name), mask in zip(unread, np.split(values, sizes[:-1]), strict=True):
        batch.masks[name] = mask
