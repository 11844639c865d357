"""Fast gradient sign (Goodfellow et al. 2015, arXiv:1412.6572)."""

from __future__ import annotations

from dataclasses import dataclass

from robustkit.attack_api import Answer, Model, Rows, State, ascend
from robustkit.core import criteria
from robustkit.core.criteria import Goal
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images
from robustkit.core.threat import ThreatModel
from robustkit.registry import attack


@attack("fgsm", paper="arXiv:1412.6572", norms=("linf", "l2", "l1"), access="gradient", ascent=True)
@dataclass(frozen=True, slots=True)
class FGSM:
    """One step of length eps in the direction of steepest ascent for the norm."""

    loss: str = "ce"

    def __post_init__(self) -> None:
        """Raise UsageError for an unknown loss."""
        criteria.loss(self.loss)

    @property
    def steps(self) -> int:
        """One."""
        return 1

    def __call__(self, model: Model, x: Images, goal: Goal, threat: ThreatModel, *, rng: RowRng) -> Images:
        """Return x moved by eps, projected onto ball and box."""
        return ascend(self, model, x, goal, threat, rng)

    def init(self, rows: Rows) -> State:
        """Return the clean images."""
        return {"x": rows.x}

    def step(self, rows: Rows, state: State, answer: Answer) -> State:
        """Return x moved by eps, projected onto ball and box."""
        return {"x": rows.threat.step_inside(rows.x, rows.x, answer.gradient, float(rows.threat.eps))}
