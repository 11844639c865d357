"""The input of the diagnoses: a model, a first batch, and the threat of the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from robustkit.attack_api import Model, RowWise
from robustkit.attack_api.driver import AttackTrace, trace_attack
from robustkit.attack_api.row_wise import finite
from robustkit.core.criteria import Goal
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images, Labels, Logits
from robustkit.core.step_size import StepSize
from robustkit.core.threat import ThreatModel
from robustkit.registry import make

# The number of rows for the costly diagnoses, and for the costliest.
MAX_ROWS, MAX_ROWS_COSTLY = 32, 8
# The step size of the diagnoses' PGD, for which the thresholds were chosen.
STEP_SIZE = StepSize(0.1)
# The number of draws of a random model that decide here.
DRAWS = 9
# Logits that differ by a smaller share of the largest are the same.
NOISE = 1e-3
# An attack of several stages takes one more step between stages.
MAX_EXTRA_STEPS = 2


@dataclass(frozen=True)
class Probe:
    """A model under diagnosis, a first batch `x` (B C H W) with `labels` (B), and the run's attacks on it.

    The costly diagnoses use only the first 32 rows that the model classifies correctly. `net` is the module of the
    model, if it has one.
    """

    model: Model
    x: Images
    labels: Labels
    threat: ThreatModel
    attacks: Sequence[Any] = ()
    seed: int = 0
    net: nn.Module | None = None

    @cached_property
    def logits(self) -> Logits:
        """The model's logits on the whole batch."""
        with torch.no_grad():
            return self.model(self.x)

    @cached_property
    def correct_rows(self) -> torch.Tensor:
        """Positions of the first rows that the model classifies correctly."""
        return (self.logits.argmax(1) == self.labels).nonzero()[:MAX_ROWS, 0]

    @cached_property
    def gradients(self) -> dict[str, Images]:
        """The correct rows' input gradients of the losses `ce` and `margin`, as attacks use them."""
        return {loss: finite(gradient) for loss, gradient in self.raw_gradients.items()}

    @cached_property
    def raw_gradients(self) -> dict[str, Images]:
        """The same gradients before infinite values and NaN are replaced by 0."""
        goal, losses = Goal(self.labels[self.correct_rows]), ("ce", "margin")
        with torch.enable_grad():
            x = self.x[self.correct_rows].requires_grad_()
            logits = self.model(x)
            values = [goal.loss(logits, loss).sum() for loss in losses]
        return {
            loss: torch.autograd.grad(value, x, retain_graph=loss != losses[-1])[0]
            for loss, value in zip(losses, values, strict=True)
        }

    @cached_property
    def first_correct_rows(self) -> torch.Tensor:
        """Positions of the first of the few rows."""
        return self.correct_rows[:MAX_ROWS_COSTLY]

    @cached_property
    def deterministic(self) -> bool:
        """Whether the model returns the same logits twice."""
        with torch.no_grad():
            one, other = (self.model(self.x[self.first_correct_rows]) for _ in range(2))
        return agree(one, other)

    @cached_property
    def strongest(self) -> Any:
        """The longest of the run's attacks with one gradient and one start, but none with the loss dlr; or None.

        With two classes, as the planted points have, dlr has no gradient.
        """
        norm = self.threat.norm
        climbing = [
            attack
            for attack in self.attacks
            if attack.info.access == "gradient"
            and isinstance(attack, RowWise)
            and not (options := attack.loop_options(norm)).targets
            and not options.vector_objective
            and attack.loss != "dlr"
            and options.steps <= attack.steps + MAX_EXTRA_STEPS
        ]
        return max(climbing, key=lambda attack: attack.loop_options(norm).steps, default=None)

    @cached_property
    def left(self) -> torch.Tensor:
        """Positions of the correct rows that 20 steps of PGD do not fool."""
        return self.robust_under(self.threat, self.correct_rows, steps=20)

    @cached_property
    def trail(self) -> AttackTrace:
        """The trace of 40 steps of PGD on those rows, from the same starts, until all have been fooled."""
        x, goal = self.x[self.left], Goal(self.labels[self.left])
        rng = RowRng(self.seed, "checks", self.left)
        return trace_attack(
            make("pgd", loss="margin", steps=40, step_size=STEP_SIZE),
            self.model,
            x,
            goal,
            self.threat,
            rng,
            enough=True,
        )

    def robust_under(self, threat: ThreatModel, rows: torch.Tensor, steps: int) -> torch.Tensor:
        """Return which of these rows PGD of this many steps does not fool under a threat.

        For a random model the majority of a few draws at the last point decides: one misclassified draw may be
        chance.
        """
        if not len(rows):
            return rows
        x, goal = self.x[rows], Goal(self.labels[rows])
        attack, rng = (
            make("pgd", loss="margin", steps=steps, step_size=STEP_SIZE),
            RowRng(self.seed, "checks", rows),
        )
        if self.deterministic:
            found, draws = attack(self.model, x, goal, threat, rng=rng), 1
        else:
            found, draws = trace_attack(attack, self.model, x, goal, threat, rng).last, DRAWS
        with torch.no_grad():
            fooled = [goal.reached(self.model(found)) for _ in range(draws)]
        return rows[2 * torch.stack(fooled).sum(0) <= draws]


def agree(one: Logits, other: Logits) -> bool:
    """Return whether two outputs are the same but for float noise."""
    return bool((one - other).abs().max() <= NOISE * one.abs().max())
