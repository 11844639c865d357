"""Runs of PGD on images that resist: whether more steps would fool more of them.

The long runs decide the flags: 20 steps and then 40, from the same random start, on every image. They cost 80
passes for each image that stays robust, so a short run goes first: one step of full length and eight queries with
steps of a quarter, on a few images that the first step does not fool. On nets whose gradients are useful it fools
as many images as 20 steps of a tenth. If its losses have stopped rising, the long runs are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from robustkit.attack_api import Answer, Model, Rows, State
from robustkit.attack_api.driver import drive, trace_attack
from robustkit.attack_api.row_wise import query_rows
from robustkit.checks import indicators
from robustkit.core.shapes import Mask, PerRow
from robustkit.core.step_size import StepSize
from robustkit.registry import make

# The step size of the long runs, for which the thresholds were chosen.
STEP_SIZE = StepSize(0.1)
LONG_STEPS = 40
# The queries of a short run after the first step, the step size between them, and the most images that it follows.
SHORT_QUERIES, SHORT_STEP_SIZE, MAX_FOLLOWED = 8, StepSize(0.25), 3
# A short run has stopped rising if half of its failed rows gained at most this share of their rise in the second
# half. Adversarially trained nets gain 0.00 to 0.10, nets with too few steps 0.2 to 0.4.
MAX_LATE_SHARE = 0.15
# From so many images that only the second half fools the long runs are needed.
MIN_GAINED = 3


@dataclass(frozen=True)
class PGDRuns:
    """Runs of PGD on the images that its first steps do not fool.

    Attributes:
        tested: the images that the runs began with.
        steps: of a run.
        late: the last steps in which a rising loss counts, and how large the rise, in words.
        fooled: whether the model was fooled at each query (B T); None if no image was left for the runs.
        gained: images that the second half of the steps fooled first.
        rising: of the failed runs, those whose loss still rose (B).
        settled: whether longer runs are unnecessary.
    """

    tested: int
    steps: int
    late: str
    fooled: Mask | None = None
    gained: int = 0
    rising: Mask | None = None
    settled: bool = True

    @property
    def failed(self) -> int:
        """The number of runs that never fooled the model."""
        return 0 if self.fooled is None else int((~self.fooled.any(1)).sum())

    @property
    def still_rising(self) -> int:
        """The number of failed runs whose loss still rose."""
        return 0 if self.rising is None else int(self.rising.sum())


def pgd(steps: int, step_size: StepSize = STEP_SIZE) -> Any:
    """Return PGD on the margin, as the checks run it."""
    return make("pgd", loss="margin", steps=steps, step_size=step_size)


def short_runs(model: Model, rows: Rows, clean: Answer) -> PGDRuns:
    """Return short runs on rows that the model classifies correctly, with its answers at the clean images."""
    first = pgd(1, StepSize(1.0)).step(rows, {"x": rows.x}, clean)["x"]
    with torch.no_grad():
        hard = (~rows.goal.reached(model(first))).nonzero()[:MAX_FOLLOWED, 0]
    result = PGDRuns(len(rows.x), SHORT_QUERIES, "15 % of their rise in the last four")
    if not len(hard):
        return result
    rows, losses, fooled = rows.select(hard), [clean.loss[hard].double()], list[Mask]()
    attack, last = pgd(SHORT_QUERIES, SHORT_STEP_SIZE), SHORT_QUERIES - 1

    def observe(state: State, answer: Answer) -> tuple[State, Answer] | None:
        losses.append(answer.loss.double())
        fooled.append(rows.goal.reached(answer.logits))
        return None if torch.stack(fooled).any(0).all() else (state, answer)

    drive(
        {"x": first[hard]},
        last,
        lambda number, state: query_rows(attack, model, rows, state, number < last),
        lambda number, state, answer: attack.step(rows, state, answer),
        observe,
    )
    seen, half = torch.stack(fooled, 1), SHORT_QUERIES // 2
    failed, gained = ~seen.any(1), int((seen.any(1) & ~seen[:, :half].any(1)).sum())
    share = late_share(torch.stack(losses, 1), half)
    settled = gained < MIN_GAINED and (not failed.any() or float(share[failed].median()) <= MAX_LATE_SHARE)
    return replace(result, fooled=seen, gained=gained, rising=(share > MAX_LATE_SHARE) & failed, settled=settled)


def late_share(losses: PerRow, half: int) -> PerRow:
    """Return which share of the rise of each row's best loss (B T) came after the query `half`; 1 if none rose."""
    best = losses.cummax(1).values
    rise = best[:, -1] - losses[:, 0]
    late = best[:, -1] - best[:, min(half, losses.shape[1] - 1)]
    return torch.where(rise > 0, late / rise.clamp(min=1e-300), 1.0)


def long_runs(model: Model, rows: Rows, tested: int) -> PGDRuns:
    """Return runs of 40 steps on the rows that 20 steps, from the same start, did not fool."""
    result = PGDRuns(tested, LONG_STEPS, "a twentieth of their rise in the last ten")
    if not len(rows.x):
        return result
    trace = trace_attack(pgd(LONG_STEPS), model, rows.x, rows.goal, rows.threat, rows.rng, enough=True)
    fooled = trace.fooled
    rising = indicators.incomplete(trace.losses) & ~fooled.any(1)
    return replace(result, fooled=fooled, gained=int(fooled.any(1).sum()), rising=rising)
