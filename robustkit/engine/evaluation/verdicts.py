"""The engine's own verdict on what an attack returns: inside ball and box, and wrong in float32."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robustkit.core import losses
from robustkit.core.errors import RunError
from robustkit.core.shapes import Images, Labels, Logits, Mask, PerRow
from robustkit.core.threat import ThreatModel
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.engine.model.random_verdicts import majority_vote


@dataclass(frozen=True)
class Verdicts:
    """Points (B C H W) inside the threat, with the model's word on each.

    `refused` marks the rows whose point fooled the model only outside ball and box, `broken` those where the
    logits were NaN or infinite; neither counts as fooled. `forwards` is what each took. Of a random model
    `right` is the share of fresh draws that were right, `once` whether the first was; of another both say what
    the one answer is.
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

    def select(self, mask: np.ndarray) -> Verdicts:
        """Return these rows."""
        index = torch.from_numpy(mask).to(self.fooled.device)
        return Verdicts(*(value[index] for value in vars(self).values()))

    def replaced(self, index: Tensor, other: Verdicts) -> Verdicts:
        """Return these with the others at these positions."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Verdicts(*(mine.index_copy(0, index, its) for mine, its in pairs))


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
    """Project what an attack found for the clean images x onto ball and box, and ask the model again.

    `known` (B K) are float32 answers at the points where there is one already, NaN elsewhere. Points that were
    `chosen` of many may have been so by luck: a success against a random model is then confirmed by fresh draws.

    Raises:
        RunError: if the attack returned another shape.
    """
    if found.shape != x.shape:
        raise RunError(f"the attack returned shape {tuple(found.shape)} for images of {tuple(x.shape)}.")
    found = found.detach().to(x)
    whole = found.flatten(1).isfinite().all(1)
    found = torch.where(whole.view(-1, 1, 1, 1), found, x)
    point = threat.project(found, x)
    moved = (point != found).flatten(1).any(1)
    if instrumented.random:
        return _redrawn(instrumented, point, labels, chosen)
    if known is None:
        unknown, logits = torch.ones_like(moved), instrumented.logits_fp32(point)
    else:
        unknown, logits = known.isnan().any(1) | moved, known.clone()
        if unknown.any():
            logits[unknown] = instrumented.logits_fp32(point[unknown]).to(logits)
    broken = ~logits.isfinite().all(1)
    prediction = logits.argmax(1)
    fooled = (prediction != labels) & ~broken
    doubtful = ~fooled & moved
    refused = torch.zeros_like(fooled)
    if doubtful.any():
        refused[doubtful] = instrumented.logits_fp32(found[doubtful]).argmax(1) != labels[doubtful]
    margin = torch.where(broken, 0.0, margins(logits, labels))
    cost, right = unknown.long() + doubtful.long(), prediction == labels
    return Verdicts(point, prediction, margin, fooled, refused, broken, cost, right.double(), right)


def _redrawn(instrumented: InstrumentedModel, point: Images, labels: Labels, chosen: bool) -> Verdicts:
    """Judge by draws: fooled is a model that is more often wrong, at chosen points by other draws as well."""
    told = majority_vote(instrumented.logits_fp32, point, labels)
    fooled = (told.right < 0.5) & ~told.broken
    if chosen and fooled.any():
        told = told.replaced(fooled, majority_vote(instrumented.logits_fp32, point[fooled], labels[fooled]))
        fooled = fooled & (told.right < 0.5) & ~told.broken
    none = torch.zeros_like(fooled)
    return Verdicts(
        point, told.prediction, told.margin, fooled, none, told.broken, told.forwards, told.right, told.once
    )


def margins(logits: Logits, labels: Labels) -> PerRow:
    """Return the label's logit minus the best other one; below 0 the model is wrong."""
    return -losses.margin(logits, labels)


def image_hashes(images: Images) -> list[str]:
    """Return each row's sha256 over its float32 bytes."""
    return [hashlib.sha256(row.tobytes()).hexdigest() for row in images.float().cpu().numpy()]


def sample_ids(hashes: Sequence[str]) -> Labels:
    """Return a number below 2**32 for each image hash: the same for an image wherever in the data it is."""
    return torch.tensor([int(digest[:8], 16) for digest in hashes], dtype=torch.int64)
