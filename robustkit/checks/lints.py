"""Checks of losses before an attack begins: whether each loss is useless on a model, as a traffic light.

They need the logits (B K) of a few images and two gradients; no model is run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from robustkit.core.shapes import Images, Labels, Logits

MAX_OTHER_PROBABILITY = 1e-6
FLAT = 1e-6
# The shares of images, and values of 1 - cosine, from which a light is yellow and red.
YELLOW, RED = 0.25, 0.75
MEANINGS = {
    "ce-saturated": "of cross-entropy: it has no slope where the label's probability is 1",
    "dlr-flat": "of dlr: it divides by a gap of logits that is almost zero",
    "probabilities": "of cross-entropy: outputs sum to 1, so it takes a second softmax",
    "zero-masking": "of margins that mask the label by 0: they have no slope where all outputs are below",
    "underflow": "of every loss: classes share one lower bound, as log(clamp(p)) has, and have no gradient",
    "zero-gradient": "of the loss that was differentiated: its gradient is zero",
    "unlike-gradients": "of the loss that was differentiated: two gradients at the same point differ",
}


@dataclass(frozen=True)
class Lint:
    """One finding: a share of images from 0 (good) to 1, or 1 minus a cosine, and what it means."""

    code: str
    value: float
    meaning: str

    @property
    def light(self) -> str:
        """`green`, `yellow` or `red`."""
        return "red" if self.value > RED else "yellow" if self.value > YELLOW else "green"


def lints(logits: Logits, labels: Labels, gradient: Images, again: Images) -> list[Lint]:
    """Return all findings; `gradient` and `again` are two draws of the same loss's input gradient."""
    values = {
        "ce-saturated": ce_saturation(logits, labels),
        "dlr-flat": dlr_flatness(logits),
        "probabilities": double_softmax(logits),
        "zero-masking": zero_masking(logits),
        "underflow": underflow(logits),
        "zero-gradient": zero_gradients(gradient),
        "unlike-gradients": gradient_disagreement(gradient, again),
    }
    return [Lint(code, value, MEANINGS[code]) for code, value in values.items()]


def ce_saturation(logits: Logits, labels: Labels) -> float:
    """Return the share of rows whose label has a probability within 1e-6 of 1."""
    others = logits.double().log_softmax(1).gather(1, labels[:, None])[:, 0]
    return _share(-torch.expm1(others) < MAX_OTHER_PROBABILITY)


def dlr_flatness(logits: Logits) -> float:
    """Return the share of rows whose first and third logits (second of two) are within 1e-6 of their size."""
    top = logits.topk(min(3, logits.shape[1]), 1).values
    return _share(top[:, 0] - top[:, -1] <= FLAT * logits.abs().amax(1))


def double_softmax(logits: Logits) -> float:
    """Return the share of rows that are probabilities."""
    return _share((logits >= 0).all(1) & ((logits.sum(1) - 1).abs() < 1e-4))


def zero_masking(logits: Logits) -> float:
    """Return the share of rows without an output above 0."""
    return _share((logits <= 0).all(1))


def underflow(logits: Logits) -> float:
    """Return the share of rows of which two or more classes, but not all, share the lowest value to the bit."""
    floor = (logits == logits.amin(1, keepdim=True)).sum(1)
    return _share((floor > 1) & (floor < logits.shape[1]))


def zero_gradients(gradient: Images) -> float:
    """Return the share of rows whose gradient is zero."""
    return _share((gradient.flatten(1) == 0).all(1))


def gradient_disagreement(gradient: Images, again: Images) -> float:
    """Return one minus the mean cosine of two gradients, from 0 to 1; it is 0 for two zeros."""
    one, other = gradient.flatten(1).double(), again.flatten(1).double()
    cosine = F.cosine_similarity(one, other, eps=1e-300)
    cosine = torch.where((one == 0).all(1) & (other == 0).all(1), 1.0, cosine)
    return float((1 - cosine).mean().clamp(0, 1))


def _share(rows: torch.Tensor) -> float:
    return float(rows.double().mean()) if len(rows) else 0.0
