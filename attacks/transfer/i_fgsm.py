"""Iterative gradient sign (Kurakin et al. 2017, arXiv:1607.02533)."""

from __future__ import annotations

from dataclasses import dataclass

from robustkit.attack_api import Answer, Rows, RowWise, State
from robustkit.core import criteria
from robustkit.core.step_size import StepSize
from robustkit.registry import attack
from robustkit.registry.ranges import Count


@attack("i-fgsm", paper="arXiv:1607.02533", norms=("linf", "l2"), access="gradient", ascent=True)
@dataclass(frozen=True, slots=True)
class IFGSM(RowWise):
    """Steps of constant length along the gradient, from the clean image; `step_size` none is eps / steps."""

    steps: Count = 10
    step_size: StepSize | None = None
    loss: str = "ce"

    def __post_init__(self) -> None:
        """Raise UsageError for an unknown loss."""
        criteria.loss(self.loss)

    def init(self, rows: Rows) -> State:
        """Return the clean images."""
        return {"x": rows.x}

    def step(self, rows: Rows, state: State, answer: Answer) -> State:
        """Return the projected next points."""
        size = (self.step_size or StepSize(1 / self.steps)).length(float(rows.threat.eps))
        moved = state["x"] + size * rows.threat.ascent(answer.gradient)
        return {"x": rows.project(moved)}
