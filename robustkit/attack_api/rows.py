"""The values that an iterative attack works on: rows, their state, and the result of a query."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from robustkit.core.criteria import Goal
from robustkit.core.devices import ComputeDevice
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images, Logits, Mask
from robustkit.core.threat import ThreatModel, per_row

Model = Callable[[Images], Logits]
State = dict[str, Tensor]


@dataclass(frozen=True)
class Rows:
    """The data of a row that is constant while it is attacked.

    Attributes:
        x: the clean images (B C H W) in [0, 1].
        goal: decides whether a row has succeeded.
        threat: the perturbations that are allowed.
        rng: random numbers, each row's own.
        aim: the goal in the attack's loss; it has the current target if the attack tries several.
        past: the margin of the clean image and the highest margin that earlier attacks of the run reached
            (B 2); None if unknown.
        nearest: the point of that highest margin (B C H W); where the threat is minimal, the nearest adversarial
            point so far, or the clean image if there is none. None if unknown.
        bounds: `threat.bounds(x)`, computed once for all steps; None if unknown or if there are none.
    """

    x: Images
    goal: Goal
    threat: ThreatModel
    rng: RowRng
    aim: Goal
    past: Tensor | None = None
    nearest: Images | None = None
    bounds: tuple[Images, Images] | None = None

    def select(self, index: Tensor) -> Rows:
        """Return these rows, by position or mask."""
        return Rows(
            self.x[index],
            self.goal.select(index),
            self.threat,
            self.rng.select(index),
            self.aim.select(index),
            None if self.past is None else self.past[index],
            None if self.nearest is None else self.nearest[index],
            None if self.bounds is None else (self.bounds[0][index], self.bounds[1][index]),
        )

    @property
    def steps_taken(self) -> np.ndarray:
        """How many steps each row has taken (B), on the host; inside `step` with the one that is being taken."""
        return np.broadcast_to(np.asarray(self.rng.step), len(self.x))

    def upload(self, array: np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
        """Return numbers of the host, such as each row's step size, on the images' device."""
        tensor = torch.from_numpy(array)
        return ComputeDevice(self.x.device).upload(tensor if dtype is None else tensor.to(dtype))

    def project(self, x_adv: Images) -> Images:
        """Return the nearest points in ball and box (see `ThreatModel.project`)."""
        if self.bounds is None:
            return self.threat.project(x_adv, self.x)
        return x_adv.to(self.x.dtype).clamp(*self.bounds)

    def retract(self, x_adv: Images) -> Images:
        """Return points in ball and box (see `ThreatModel.retract`)."""
        return self.threat.retract(x_adv, self.x) if self.bounds is None else self.project(x_adv)

    @property
    def reach(self) -> float | Tensor:
        """The threat's radius; if it is minimal, each row's distance of the nearest point so far (B 1 1 1).

        Where there is no such point it is the distance of the farthest image.
        """
        if not self.threat.minimal:
            return self.threat.radius
        farthest = self.threat.distance((self.x < 0.5).to(self.x.dtype), self.x)
        if self.nearest is not None:
            distance = self.threat.distance(self.nearest, self.x)
            farthest = torch.where(distance > 0, distance, farthest)
        return per_row(farthest, self.x).to(self.x.dtype)

    def random_start(self) -> Images:
        """Return random points of the threat (B C H W); if it is minimal, at half of each row's reach."""
        if not self.threat.minimal:
            return self.threat.random_start(self.x, self.rng)
        noise = self.rng.normal(*self.x.shape[1:]).to(self.x.dtype)
        length = per_row(self.threat.distance(noise, torch.zeros_like(noise)).to(noise.dtype), noise)
        return (self.x + 0.5 * self.reach * noise / length.clamp(min=1e-12)).clamp(0, 1)

    def with_momentum(
        self, point: Images, stepped: Images, before: Images, first: np.ndarray, momentum: float
    ) -> Images:
        """Return the points after a step with APGD's momentum (arXiv:2003.01690), before they are projected.

        Args:
            point: where the rows are (B C H W).
            stepped: the points after the step alone.
            before: where they were one step ago.
            first: rows that take the first step of a run (B), which has no momentum.
            momentum: the weight of the step; that of the last step's direction is 1 - momentum.
        """
        new: float | Tensor = momentum
        if first.any():
            new = per_row(self.upload(np.where(first, 1.0, momentum), point.dtype), point)
        return point + new * (stepped - point) + (1 - new) * (point - before)

    def near_boundary(self, share: float) -> Mask | None:
        """Return the rows (B) whose remaining margin is at most this share of that gained; None if unknown."""
        if self.past is None:
            return None
        clean, nearest = self.past.unbind(1)
        return -nearest <= share * (nearest - clean)


class Answer(NamedTuple):
    """The result of a query.

    Attributes:
        logits: of the model (B K).
        loss: the attack's objective (B), or (B M) if it has M columns.
        gradient: of the objective in the images, (B C H W) or (B M C H W); zero for rows that need none.
    """

    logits: Logits
    loss: Tensor
    gradient: Tensor

    def select(self, index: Tensor) -> Answer:
        """Return the answers to these rows, by position or mask."""
        return Answer(self.logits[index], self.loss[index], self.gradient[index])


def select_state(state: State, index: Tensor) -> State:
    """Return the state of these rows, by position or mask."""
    return {name: value[index] for name, value in state.items()}
