"""Iterative gradient sign (Kurakin et al. 2017, arXiv:1607.02533)."""

from __future__ import annotations

from dataclasses import dataclass

from robustkit import losses
from robustkit.registry import attack
from robustkit.rows import Answer, Rows, RowWise, State


@attack("i-fgsm", paper="arXiv:1607.02533", norms=("linf", "l2"), access="gradient", ascent=True)
@dataclass(frozen=True, slots=True)
class IFGSM(RowWise):
    """Steps of one length along the gradient, from the clean image; `step_size` is a fraction of eps."""

    steps: int = 10
    step_size: float = 0.1
    loss: str = "ce"

    def __post_init__(self) -> None:
        """Refuse an unknown loss before anything runs."""
        losses.loss(self.loss)

    def init(self, rows: Rows) -> State:
        """Return the clean images."""
        return {"x": rows.x}

    def step(self, rows: Rows, state: State, answer: Answer) -> State:
        """Return the projected next points."""
        moved = state["x"] + self.step_size * float(rows.threat.eps) * rows.threat.ascent(answer.gradient)
        return {"x": rows.threat.project(moved, rows.x)}
