"""Refuses runs with meaningless verdicts: non-finite logits, labels outside the classes, too large an eps."""

from __future__ import annotations

import numpy as np

from robustkit.core.errors import RunError, UsageError
from robustkit.core.shapes import Logits
from robustkit.core.threat import EXAMPLE_EPS, ThreatModel
from robustkit.data.samples import Samples


def check_logits(logits: Logits, labels: np.ndarray, positions: np.ndarray) -> None:
    """Check a model's logits of clean images.

    Args:
        logits: of the images (B K).
        labels: of the images (B).
        positions: of the images in the data (B).

    Raises:
        RunError: if logits are NaN or infinite.
        UsageError: if a label is outside the classes.
    """
    broken = (~logits.isfinite().all(1)).nonzero()[:, 0].tolist()
    if broken:
        raise RunError(
            f"the model gives NaN or infinite logits for {len(broken)} of {len(logits)} clean images, "
            f"the first at index {positions[broken[0]]}; they have no verdict."
        )
    outside = np.flatnonzero((labels < 0) | (labels >= logits.shape[1]))
    if len(outside):
        raise UsageError(
            f"label {labels[outside[0]]} at index {positions[outside[0]]} is outside the model's "
            f"{logits.shape[1]} classes; check that data and model belong together."
        )


def check_labels(samples: Samples, model: str, classes: int) -> None:
    """Raise UsageError if a label of the samples is outside a model's classes; `model` is its string."""
    if len(outside := np.flatnonzero(samples.labels >= classes)):
        raise UsageError(
            f"{model} has {classes} classes but {samples.name} has the label {samples.labels[outside[0]]} at "
            f"position {outside[0]}; give the data it was made for."
        )


def check_eps(threat: ThreatModel, shape: tuple[int, ...]) -> None:
    """Raise UsageError if any two images of this shape (C, H, W) are within the threat's eps."""
    if not threat.minimal and float(threat.eps) > threat.diameter(shape):
        raise UsageError(
            f"threat '{threat}' reaches every image of {'x'.join(map(str, shape))} "
            f"(their largest distance is {threat.diameter(shape):.4g}); write a smaller eps."
        )


def check_not_random(threat: ThreatModel, *, random: bool) -> None:
    """Raise UsageError for a minimum norm of a random model, whose nearest adversarial image differs by draw."""
    if threat.minimal and random:
        raise UsageError(
            f"threat '{threat}' needs a model with the same output for an image each time, and this model is "
            f"random; give an eps, e.g. {threat.norm}:{EXAMPLE_EPS[threat.norm]}."
        )
