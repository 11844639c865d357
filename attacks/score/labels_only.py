"""The base of attacks that read nothing of the model but whether an image is misclassified."""

from __future__ import annotations

from robustkit.attack_api import LoopOptions, Rows, RowWise, State
from robustkit.core.shapes import Logits, PerRow


class LabelsOnly(RowWise):
    """An attack by predicted labels, whose field `queries` is the most queries of an image.

    `step` finds 1 in `answer.loss` where the query is misclassified, else 0.
    """

    __slots__ = ()
    queries: int

    @property
    def steps(self) -> int:
        """The number of queries after the first."""
        return self.queries - 1

    def loop_options(self, norm: str) -> LoopOptions:
        """Return the loop's options: no gradient, and most queries are outside the ball."""
        return LoopOptions(self.steps, needs_gradient=False, queries_outside_ball=True)

    def objective(self, rows: Rows, state: State, logits: Logits) -> PerRow:
        """Return 1 where the image is misclassified, else 0 (B)."""
        return rows.goal.reached(logits).float()
