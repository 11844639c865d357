"""Classifiers of MAITE's protocol: from a sequence of images to a sequence of rows of scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn


def is_maite(model: object) -> bool:
    """Return whether a model follows `maite.protocols.image_classification.Model`: it has metadata with an id."""
    metadata = getattr(model, "metadata", None)
    return not isinstance(model, nn.Module) and isinstance(metadata, Mapping) and "id" in metadata


class MaiteNet:
    """A callable from images (B, C, H, W) to scores (B, K) around a MAITE classifier.

    Scores that are tensors of a graph keep their gradient.
    """

    def __init__(self, model: Callable[[Any], Any]) -> None:
        """Wrap a model; the number of classes is taken from its metadata, if it is there."""
        self.model = model
        labels = model.metadata.get("index2label")  # type: ignore[attr-defined]
        self.num_classes = len(labels) if isinstance(labels, Mapping) and len(labels) > 1 else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the scores, on the device of the images."""
        rows = [torch.as_tensor(row) for row in self.model(list(x))]
        return torch.stack(rows).to(x.device, torch.float32)
