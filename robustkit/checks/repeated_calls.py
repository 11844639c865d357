"""Repeated calls of a model: the generators that it may draw from, and whether its outputs differ."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch

from robustkit.core.shapes import Logits

# The largest change of normalised logits between calls of a model that is not random (AutoAttack's tolerance).
UNCHANGED = 1e-4
# Logits that differ by a smaller share of the largest are the same.
NOISE = 1e-3
SEEDERS: dict[str, Callable[[int], object]] = {
    "torch": torch.manual_seed,
    "numpy": np.random.seed,
    "random": random.seed,
}


def seed_generators(seed: int, differently: str | None = None) -> None:
    """Seed all global generators, the one named `differently` with the next number. The caller isolates them."""
    for name, start in SEEDERS.items():
        start(seed + (name == differently))


def normalised(logits: Logits) -> Logits:
    """Return logits (B K) divided by their norm."""
    unit: Logits = logits / logits.norm(dim=1, keepdim=True).clamp(min=1e-10)
    return unit


def change(one: Logits, other: Logits) -> float:
    """Return the largest distance of an image's normalised logits."""
    return float((normalised(one) - normalised(other)).norm(dim=1).max())


def agree(one: Logits, other: Logits) -> bool:
    """Return whether two outputs are the same but for float noise."""
    return bool((one - other).abs().max() <= NOISE * one.abs().max())
