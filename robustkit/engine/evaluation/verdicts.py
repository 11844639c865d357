"""The engine's own verdict on an attack's images: inside ball and box, and misclassified in float32."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robustkit.core import criteria
from robustkit.core.devices import ComputeDevice
from robustkit.core.errors import RunError
from robustkit.core.shapes import Images, Labels, Logits, Mask, PerRow
from robustkit.core.threat import ThreatModel
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.engine.model.random_verdicts import majority_vote


@dataclass(frozen=True)
class Verdicts:
    """The model's outputs at images inside the threat.

    Attributes:
        x: the images (B C H W).
        prediction: of each (B); of a random model the class predicted most often.
        margin: the label's logit minus the best other one (B), its mean for a random model.
        fooled: whether the model misclassifies it (B); a random model in more than half of the draws.
        refused: whether it fooled the model only before projection onto ball and box (B); not counted as fooled.
        broken: whether logits were NaN or infinite (B); not counted as fooled.
        forwards: of each (B).
        right: the share of draws with the right class (B); 0 or 1 for a model that is not random.
        once: whether the first draw was right (B).
    """

    x: Images
    prediction: Labels
    margin: PerRow
    fooled: Mask
    refused: Mask
    broken: Mask
    forwards: Labels
    right: PerRow
    once: Mask

    def select(self, index: np.ndarray) -> Verdicts:
        """Return these rows, by position or mask."""
        positions = np.flatnonzero(index) if index.dtype == bool else index
        there = ComputeDevice(self.fooled.device).upload(torch.from_numpy(positions))
        return Verdicts(*(value[there] for value in vars(self).values()))

    def replaced(self, index: Tensor, other: Verdicts) -> Verdicts:
        """Return these with rows of another at these positions."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Verdicts(*(own.index_copy(0, index, new) for own, new in pairs))


def judge(
    instrumented: InstrumentedModel,
    x: Images,
    labels: Labels,
    found: Images,
    threat: ThreatModel,
    known: Logits | None = None,
    *,
    chosen: bool = True,
) -> Verdicts:
    """Project an attack's images onto ball and box and return the model's verdicts on them.

    Args:
        instrumented: the model.
        x: clean images (B C H W).
        labels: of these (B).
        found: what the attack returned (B C H W).
        threat: the threat.
        known: float32 logits (B K) of `found` where they are known, else NaN.
        chosen: whether `found` was selected by its logits; a success against a random model is then confirmed by
            new draws.

    Raises:
        RunError: if the attack returned another shape.
    """
    if found.shape != x.shape:
        raise RunError(f"the attack returned shape {tuple(found.shape)} for images of {tuple(x.shape)}.")
    found = found.detach().to(x)
    finite = found.flatten(1).isfinite().all(1)
    found = torch.where(finite.view(-1, 1, 1, 1), found, x)
    point = threat.project(found, x)
    moved = (point != found).flatten(1).any(1)
    if instrumented.random:
        return _by_vote(instrumented, point, labels, chosen)
    if known is None:
        unknown, logits = torch.ones_like(moved), instrumented.logits_fp32(point)
        some_moved = bool(moved.any())
    else:
        unknown, logits = known.isnan().any(1) | moved, known.clone()
        some_unknown, some_moved = torch.stack([unknown.any(), moved.any()]).tolist()
        if some_unknown:
            logits[unknown] = instrumented.logits_fp32(point[unknown]).to(logits)
    broken = ~logits.isfinite().all(1)
    prediction = logits.argmax(1)
    fooled = (prediction != labels) & ~broken
    doubtful = ~fooled & moved
    refused = torch.zeros_like(fooled)
    if some_moved and doubtful.any():
        refused[doubtful] = instrumented.logits_fp32(found[doubtful]).argmax(1) != labels[doubtful]
    margin = torch.where(broken, 0.0, margins(logits, labels))
    cost, right = unknown.long() + doubtful.long(), prediction == labels
    return Verdicts(point, prediction, margin, fooled, refused, broken, cost, right.double(), right)


def _by_vote(instrumented: InstrumentedModel, point: Images, labels: Labels, chosen: bool) -> Verdicts:
    """Return verdicts by majority of draws; a success at chosen points must hold in a second set of draws."""
    votes = majority_vote(instrumented.logits_fp32, point, labels)
    fooled = (votes.right < 0.5) & ~votes.broken
    if chosen and fooled.any():
        votes = votes.replaced(fooled, majority_vote(instrumented.logits_fp32, point[fooled], labels[fooled]))
        fooled = fooled & (votes.right < 0.5) & ~votes.broken
    none = torch.zeros_like(fooled)
    return Verdicts(
        point, votes.prediction, votes.margin, fooled, none, votes.broken, votes.forwards, votes.right, votes.once
    )


def margins(logits: Logits, labels: Labels) -> PerRow:
    """Return the label's logit minus the best other one (B); below 0 the model misclassifies."""
    return -criteria.margin(logits, labels)


def image_hashes(images: Images) -> list[str]:
    """Return each row's sha256 over its float32 bytes."""
    return [hashlib.sha256(row.tobytes()).hexdigest() for row in images.float().cpu().numpy()]


def sample_ids(hashes: Sequence[str]) -> Labels:
    """Return a number below 2**32 for each image hash, to seed its random numbers whatever its position."""
    return torch.tensor([int(digest[:8], 16) for digest in hashes], dtype=torch.int64)
