"""The attacker's goal for each image, and the losses that attacks maximise to reach it.

The goal is any class but the label, or a target class. Each loss rises towards success and is defined for every
number of classes K >= 2. All take logits (B K), the true `labels` (B) and, for a targeted goal, `targets` (B), and
return one value per row (B).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from robustkit.core.errors import did_you_mean
from robustkit.core.shapes import Labels, Logits, Mask, PerRow

Loss = Callable[[Logits, Labels, "Labels | None"], PerRow]

# Added to the denominator of `dlr`.
EPSILON = 1e-12


def ce(logits: Logits, labels: Labels, targets: Labels | None = None) -> PerRow:
    """Cross-entropy of the label, or minus that of the target."""
    if targets is None:
        return F.cross_entropy(logits, labels, reduction="none")
    return -F.cross_entropy(logits, targets, reduction="none")


def margin(logits: Logits, labels: Labels, targets: Labels | None = None) -> PerRow:
    """Logit of the best other class, or of the target, minus that of the label; above 0 it is misclassified."""
    own = logits.gather(1, labels[:, None])[:, 0]
    if targets is not None:
        return logits.gather(1, targets[:, None])[:, 0] - own
    return logits.scatter(1, labels[:, None], -torch.inf).amax(1) - own


def dlr(logits: Logits, labels: Labels, targets: Labels | None = None) -> PerRow:
    """Difference of logits ratio (Croce & Hein 2020, arXiv:2003.01690): the margin over a gap of logits.

    The gap is first minus third largest, or first minus the mean of third and fourth for a target.
    With fewer classes the gap is first minus the mean of the other two (K = 3, targeted; with first minus third
    the loss would be constant at -1 for the last class), and there is no division for K = 2. The reference
    raises an IndexError there.
    """
    if logits.shape[1] == 2:
        return margin(logits, labels, targets)
    top = logits.topk(min(4, logits.shape[1]), dim=1).values
    low = top[:, 2] if targets is None else top[:, -2:].mean(1)
    return margin(logits, labels, targets) / (top[:, 0] - low + EPSILON)


LOSSES: dict[str, Loss] = {"ce": ce, "margin": margin, "dlr": dlr}


def loss(name: str) -> Loss:
    """Return the loss of that name; UsageError with the nearest name if there is none."""
    if name not in LOSSES:
        raise did_you_mean("loss", name, LOSSES)
    return LOSSES[name]


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
        """Return the named loss (B) of logits (B K), one of `LOSSES`; it rises towards success."""
        function = LOSSES.get(name) or loss(name)
        return function(logits, self.labels, self.targets)

    def select(self, index: Tensor) -> Goal:
        """Return the goal of these rows, by position or mask."""
        targets = None if self.targets is None else self.targets[index]
        return replace(self, labels=self.labels[index], targets=targets)
