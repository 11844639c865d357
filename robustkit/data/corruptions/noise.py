"""Corruptions by noise: Gaussian, shot and impulse."""

from __future__ import annotations

import numpy as np
import torch

from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images


def gaussian_noise(x: Images, rng: RowRng, deviation: float) -> Images:
    """Return the images with normal noise of this standard deviation."""
    return x + deviation * rng.normal(*x.shape[1:])


def shot_noise(x: Images, rng: RowRng, photons: float) -> Images:
    """Return the images counted with Poisson noise, `photons` at full brightness."""
    # The stream of RandomState is frozen, so that an image gets the same counts with every release of NumPy.
    counts = [
        np.random.RandomState(seed).poisson(photons * image)
        for seed, image in zip(rng.ids.tolist(), x.double().numpy(), strict=True)
    ]
    return torch.from_numpy(np.stack(counts) / photons).to(x.dtype)


def impulse_noise(x: Images, rng: RowRng, share: float) -> Images:
    """Return the images with this share of their values set to 0 or 1."""
    drawn = rng.uniform(*x.shape[1:])
    salt = torch.where(drawn < share / 2, torch.ones_like(x), x)
    return torch.where((drawn >= share / 2) & (drawn < share), torch.zeros_like(x), salt)
