"""The input of the diagnoses: a model, a first batch, and the threat of the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from robustkit.attack_api import Answer, Model, Rows, RowWise, query
from robustkit.attack_api.driver import trace_attack
from robustkit.attack_api.row_wise import finite
from robustkit.checks.gradient_calls import counted_gradient_calls
from robustkit.checks.nearby import MAX_SMALL_CHANGE, MAX_SMALL_ERROR, Nearby, measure_nearby
from robustkit.checks.pgd_runs import PGDRuns, long_runs, pgd, short_runs
from robustkit.checks.repeated_calls import NOISE, UNCHANGED, change, seed_generators
from robustkit.core.criteria import Goal
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images, Labels, Logits
from robustkit.core.threat import ThreatModel
from robustkit.runs.recorded_outputs import not_recording

# The images of the first pass of the diagnoses. Passes over MORE_ROWS others follow until MAX_ROWS_COSTLY images
# are classified correctly.
MAX_ROWS, MORE_ROWS = 32, 16
# The correct images for diagnoses that need several passes for each.
MAX_ROWS_SEVERAL = 12
# The correct images for the costliest diagnoses.
MAX_ROWS_COSTLY = 8
# The number of draws of a random model that decide here.
DRAWS = 9
# Calls of the model on parts of the images it has seen, and the images of each.
REPEATS, REPEATED_ROWS = 4, 6
# An attack of several stages takes one more step between stages.
MAX_EXTRA_STEPS = 2


@dataclass(frozen=True)
class Probe:
    """A model under diagnosis, a first batch `x` (B C H W) with `labels` (B), and the run's attacks on it.

    The diagnoses use few images. `net` is the module of the model, if it has one.
    """

    model: Model
    x: Images
    labels: Labels
    threat: ThreatModel
    attacks: Sequence[Any] = ()
    seed: int = 0
    net: nn.Module | None = None

    @cached_property
    def clean(self) -> Answer:
        """The model's logits, the margin and its gradient on the first images, before infinities are replaced."""
        answers, correct, done = list[Answer](), 0, 0
        while done < len(self.x) and (correct < MAX_ROWS_COSTLY or not done):
            part = slice(done, done + (MORE_ROWS if done else MAX_ROWS))
            images, goal = self.x[part], Goal(self.labels[part])
            seed_generators(0)
            with torch.enable_grad():
                points = images.detach().requires_grad_()
                logits = self.model(points)
                margin = goal.loss(logits, "margin")
                (gradient,) = torch.autograd.grad(margin.sum(), points)
            correct += int((logits.argmax(1) == goal.labels).sum())
            done += len(images)
            answers.append(Answer(logits.detach(), margin.detach(), gradient))
        return Answer(*(torch.cat(parts) for parts in zip(*answers, strict=True)))

    @property
    def logits(self) -> Logits:
        """The model's logits on the first images."""
        return self.clean.logits

    @cached_property
    def all_logits(self) -> Logits:
        """The model's logits on all images, for shares that the first images leave undecided."""
        seen = len(self.logits)
        if seen == len(self.x):
            return self.logits
        with torch.no_grad():
            return torch.cat([self.logits, self.model(self.x[seen:])])

    @cached_property
    def correct_rows(self) -> torch.Tensor:
        """Positions of the first rows that the model classifies correctly."""
        labels = self.labels[: len(self.logits)]
        return (self.logits.argmax(1) == labels).nonzero()[:MAX_ROWS, 0]

    @cached_property
    def raw_gradients(self) -> Images:
        """The margin's gradient at the correct images, with its infinite values and NaN."""
        return self.clean.gradient[self.correct_rows]

    @cached_property
    def gradients(self) -> Images:
        """The margin's gradient at the correct images as attacks use it: 0 in place of infinite values and NaN."""
        return finite(self.raw_gradients)

    @cached_property
    def alone(self) -> tuple[Logits, int]:
        """The logits of the first image by itself, and the gradient computations inside that pass."""
        with counted_gradient_calls() as calls, torch.no_grad(), not_recording():
            logits = self.model(self.x[:1])
        return logits, len(calls)

    @property
    def first_correct_rows(self) -> torch.Tensor:
        """Positions of the first of the few rows."""
        return self.correct_rows[:MAX_ROWS_COSTLY]

    @cached_property
    def change_between_calls(self) -> float:
        """The largest change of normalised logits between calls with other seeds.

        The calls are on a few images each, those nearest to a decision boundary, where votes change first. Batches
        of other sizes have other rounding errors: where logits change all calls are repeated on all images.
        """
        order = self.clean.loss.abs().argsort(stable=True)
        changes = [0.0]
        for call in range(1, REPEATS + 1):
            part = torch.arange((call - 1) * REPEATED_ROWS, call * REPEATED_ROWS) % len(order)
            rows = order[part.to(order.device)]
            changes.append(change(self.logits[rows], self.seeded_logits(call, rows=rows)))
        if max(changes) > UNCHANGED:
            changes = [change(self.logits, self.seeded_logits(call)) for call in range(1, REPEATS + 1)]
        return max(changes)

    def seeded_logits(
        self, seed: int = 0, differently: str | None = None, rows: torch.Tensor | None = None
    ) -> Logits:
        """Return logits with all generators at this seed, one of them at the next.

        Of the images at the positions `rows`, or of the first images.
        """
        seed_generators(seed, differently)
        with torch.no_grad():
            return self.model(self.x[: len(self.logits)] if rows is None else self.x[rows])

    @cached_property
    def deterministic(self) -> bool:
        """Whether the model returns the same logits each time."""
        return self.change_between_calls <= NOISE

    @cached_property
    def nearby(self) -> Nearby:
        """What the margin and its gradient do at random points near the first correct images.

        Random models are called with the same seeds each time.
        """
        rows = self.first_correct_rows
        rows = rows.repeat(-(-MAX_ROWS_COSTLY // max(len(rows), 1)))
        copies = torch.arange(len(rows), device=rows.device)
        x, goal, rng = self.x[rows], Goal(self.labels[rows]), RowRng(self.seed, "nearby", copies)
        return measure_nearby(self.seeded_query, x, goal, self.clean.loss[rows], rng)

    def seeded_query(self, x: Images, goal: Goal, *, with_gradient: bool = True) -> Answer:
        """Return the result of a query at x (B C H W) with all generators seeded."""
        seed_generators(0)
        return query(self.model, x, goal, "margin", with_gradient)

    @cached_property
    def suspicious(self) -> bool:
        """Whether a short check was not passed: then other checks use more images or steps."""
        return (
            not self.deterministic
            or bool((self.gradients.flatten(1) == 0).all(1).any())
            or not self.raw_gradients.isfinite().all()
            or not self.nearby.slope_error <= MAX_SMALL_ERROR
            or not self.nearby.mean_change <= MAX_SMALL_CHANGE
        )

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
    def pgd_runs(self) -> PGDRuns:
        """Short runs of PGD on a few correct images, or long ones on all where these do not decide."""
        rows = self.correct_rows[:MAX_ROWS_SEVERAL]
        if not self.suspicious:
            clean = Answer(self.logits[rows], self.clean.loss[rows], self.gradients[: len(rows)])
            short = short_runs(self.model, self.rows(self.threat, rows), clean)
            if short.settled:
                return short
        left = self.robust_under(self.threat, self.correct_rows, steps=20)
        return long_runs(self.model, self.rows(self.threat, left), len(self.correct_rows))

    def rows(self, threat: ThreatModel, rows: torch.Tensor) -> Rows:
        """Return the images at these positions as the rows of an attack."""
        goal = Goal(self.labels[rows])
        return Rows(self.x[rows], goal, threat, RowRng(self.seed, "checks", rows), goal)

    def robust_under(self, threat: ThreatModel, rows: torch.Tensor, steps: int) -> torch.Tensor:
        """Return which of these rows PGD of this many steps does not fool under a threat.

        For a random model the majority of a few draws at the last point decides: one misclassified draw may be
        chance.
        """
        attack = pgd(steps)
        if not len(rows):
            return rows
        if not self.deterministic:
            data = self.rows(threat, rows)
            found = trace_attack(attack, self.model, data.x, data.goal, threat, data.rng).last
            with torch.no_grad():
                fooled = [data.goal.reached(self.model(found)) for _ in range(DRAWS)]
            return rows[2 * torch.stack(fooled).sum(0) <= DRAWS]
        # A start that fools the model needs no gradient.
        rows = self._not_fooled(rows, attack.init(self.rows(threat, rows))["x"])
        if not len(rows):
            return rows
        data = self.rows(threat, rows)
        return self._not_fooled(rows, attack(self.model, data.x, data.goal, threat, rng=data.rng))

    def _not_fooled(self, rows: torch.Tensor, points: Images) -> torch.Tensor:
        """Return which of these rows are classified correctly at their points."""
        with torch.no_grad():
            return rows[~Goal(self.labels[rows]).reached(self.model(points))]
