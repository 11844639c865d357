"""What the attacker wants of each image: to leave its label, or to reach a target."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robustkit import losses
from robustkit.shapes import Labels, Logits, Mask, PerRow


@dataclass(frozen=True)
class Goal:
    """True labels (B) and, for a targeted attack, the targets (B)."""

    labels: Labels
    targets: Labels | None = None

    def reached(self, logits: Logits) -> Mask:
        """Return which rows are where the attacker wants them; a row with NaN is not."""
        prediction = logits.argmax(1)
        hit = prediction != self.labels if self.targets is None else prediction == self.targets
        return hit & ~logits.isnan().any(1)

    def loss(self, logits: Logits, name: str = "ce") -> PerRow:
        """Return the named loss (`robustkit.losses`); it always rises towards success."""
        return losses.loss(name)(logits, self.labels, self.targets)

    def select(self, index: Tensor) -> Goal:
        """Return the goal of these rows, by position or mask."""
        return Goal(self.labels[index], None if self.targets is None else self.targets[index])
