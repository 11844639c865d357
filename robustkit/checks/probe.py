"""What the diagnoses look at: a model, a first batch, and the rules of the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from robustkit.goal import Goal
from robustkit.registry import make
from robustkit.rng import RowRng
from robustkit.rows import Model
from robustkit.shapes import Images, Labels, Logits
from robustkit.threat import ThreatModel

FEW = 32


@dataclass(frozen=True)
class Probe:
    """A model under diagnosis, a first batch `x` (B C H W) with `labels` (B), and the run's attacks.

    The dear diagnoses look at few rows only: the first 32 that the model gets right.
    """

    model: Model
    x: Images
    labels: Labels
    threat: ThreatModel
    attacks: Sequence[Any] = ()
    seed: int = 0

    @cached_property
    def logits(self) -> Logits:
        """The model's answer to the whole batch."""
        with torch.no_grad():
            return self.model(self.x)

    @cached_property
    def few(self) -> torch.Tensor:
        """Positions of the first rows that the model gets right."""
        return (self.logits.argmax(1) == self.labels).nonzero()[:FEW, 0]

    @cached_property
    def gradients(self) -> dict[str, Images]:
        """The few rows' input gradients of the losses `ce` and `margin`."""
        goal, losses = Goal(self.labels[self.few]), ("ce", "margin")
        with torch.enable_grad():
            x = self.x[self.few].requires_grad_()
            logits = self.model(x)
            values = [goal.loss(logits, loss).sum() for loss in losses]
        return {
            loss: torch.autograd.grad(value, x, retain_graph=loss != losses[-1])[0]
            for loss, value in zip(losses, values, strict=True)
        }

    def left_by(self, threat: ThreatModel, rows: torch.Tensor, **fields: Any) -> torch.Tensor:
        """Return which of these rows PGD with these fields leaves standing under a threat."""
        if not len(rows):
            return rows
        goal = Goal(self.labels[rows])
        rng = RowRng(self.seed, "checks", rows)
        found = make("pgd", loss="margin", **fields)(self.model, self.x[rows], goal, threat, rng=rng)
        with torch.no_grad():
            return rows[~goal.reached(self.model(found))]
