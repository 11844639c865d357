"""Rows on board of a flight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robustkit.rows import State

STATE = "state."


@dataclass
class Table:
    """Rows on board: arrays that the host steers by, and tensors on the device."""

    host: dict[str, np.ndarray]
    device: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.host["position"])

    def select(self, index: np.ndarray) -> Table:
        """Return these rows."""
        there = torch.from_numpy(index).to(self.device["x"].device)
        return Table(
            {name: array[index] for name, array in self.host.items()},
            {name: tensor[there] for name, tensor in self.device.items()},
        )

    def to(self, device: torch.device) -> Table:
        """Return the rows on another device."""
        return Table(self.host, {name: tensor.to(device) for name, tensor in self.device.items()})

    @staticmethod
    def join(tables: Sequence[Table]) -> Table:
        """Return the rows of all."""
        if len(tables) == 1:
            return tables[0]
        return Table(
            {name: np.concatenate([t.host[name] for t in tables]) for name in tables[0].host},
            {name: torch.cat([t.device[name] for t in tables]) for name in tables[0].device},
        )

    def spread(self, jobs: int) -> Table:
        """Return each row once for every job, side by side; only the first keeps what was spent before."""
        rows = self.select(np.repeat(np.arange(len(self)), jobs))
        rows.host["job"] = np.tile(np.arange(jobs), len(self))
        rows.host["spent"][rows.host["job"] > 0] = 0
        return rows

    def folded(self) -> Table:
        """Return one row for each sample: the one that came nearest, with what all of them spent."""
        order = np.lexsort((-self.device["nearest"].cpu().numpy(), self.host["position"]))
        samples, first = np.unique(self.host["position"][order], return_index=True)
        rows = self.select(order[first])
        rows.host["spent"] = np.stack([self.host["spent"][self.host["position"] == at].sum(0) for at in samples])
        broken = [self.device["broken"][torch.from_numpy(self.host["position"] == at)].any() for at in samples]
        rows.device["broken"] = torch.stack(broken)
        return rows

    @property
    def state(self) -> State:
        """The attack's own part."""
        return {name[len(STATE) :]: t for name, t in self.device.items() if name.startswith(STATE)}

    def with_state(self, state: State) -> Table:
        """Return the rows with another state of the attack."""
        rest = {name: t for name, t in self.device.items() if not name.startswith(STATE)}
        return Table(self.host, {**rest, **{STATE + name: t for name, t in state.items()}})
