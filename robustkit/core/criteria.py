"""The attacker's goal for each image: any class but its label, or a target class."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robustkit.core import losses
from robustkit.core.shapes import Labels, Logits, Mask, PerRow


@dataclass(frozen=True)
class Goal:
    """True labels (B) and, for a targeted attack, the targets (B).

    Args:
        labels: true labels (B).
        targets: target labels (B), or None for an untargeted attack.
        clear: the margin by which the goal must be reached, as a share of the largest logit, or of 1 if all
            logits are smaller. Minimum-norm points lie at the decision boundary, where rounding on another
            machine could change the prediction.
    """

    labels: Labels
    targets: Labels | None = None
    clear: float = 0.0

    def reached(self, logits: Logits) -> Mask:
        """Return which rows (B) of logits (B K) reach the goal; rows with NaN do not."""
        prediction = logits.argmax(1)
        hit = prediction != self.labels if self.targets is None else prediction == self.targets
        if self.clear:
            one = self.labels if self.targets is None else self.targets
            own = logits.gather(1, one[:, None])[:, 0]
            gap = (logits.scatter(1, one[:, None], -torch.inf).amax(1) - own).abs()
            hit = hit & (gap > self.clear * logits.abs().amax(1).clamp(min=1))
        return hit & ~logits.isnan().any(1)

    def loss(self, logits: Logits, name: str = "ce") -> PerRow:
        """Return the named loss (B) of logits (B K), see `robustkit.core.losses`; it rises towards success."""
        loss = losses.LOSSES.get(name) or losses.loss(name)
        return loss(logits, self.labels, self.targets)

    def select(self, index: Tensor) -> Goal:
        """Return the goal of these rows, by position or mask."""
        targets = None if self.targets is None else self.targets[index]
        return replace(self, labels=self.labels[index], targets=targets)
