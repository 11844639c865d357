"""Fast gradient sign (Goodfellow et al. 2015, arXiv:1412.6572)."""

from __future__ import annotations

from dataclasses import dataclass

from robustkit import losses
from robustkit.goal import Goal
from robustkit.registry import attack
from robustkit.rng import RowRng
from robustkit.rows import Model, query
from robustkit.shapes import Images
from robustkit.threat import ThreatModel


@attack("fgsm", paper="arXiv:1412.6572", norms=("linf", "l2", "l1"), access="gradient")
@dataclass(frozen=True, slots=True)
class FGSM:
    """One full-length step along the gradient, in the norm's own steepest direction."""

    loss: str = "ce"

    def __post_init__(self) -> None:
        """Refuse an unknown loss before anything runs."""
        losses.loss(self.loss)

    def __call__(self, model: Model, x: Images, goal: Goal, threat: ThreatModel, *, rng: RowRng) -> Images:
        """Return x moved by eps, projected onto ball and box."""
        x = x.detach()
        _, _, gradient = query(model, x, goal, self.loss)
        return threat.project(x + float(threat.eps) * threat.ascent(gradient), x)
