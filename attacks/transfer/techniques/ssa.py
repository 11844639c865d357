"""Spectrum simulation (Long et al. 2022, arXiv:2207.05382): the mean gradient over images with changed spectra.

The cosine transform is a product with a matrix from each side.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robustkit.attack_api import Oracle, Rows, Technique, TransformedOracle, per_pixel, split_rng
from robustkit.core.shapes import Images
from robustkit.registry import technique
from robustkit.registry.ranges import Count, NonNegative, Share


@technique("ssa", paper="arXiv:2207.05382")
@dataclass(frozen=True, slots=True)
class SSA(Technique):
    """Adds noise and scales each frequency at random; costs `copies` gradients.

    The noise is normal with a standard deviation of `sigma` times eps (the paper: 16/255 at eps 16/255), in l2 and
    l1 times the share of eps for each pixel; frequencies are scaled by numbers from [1 - rho, 1 + rho].
    """

    copies: Count = 20
    rho: Share = 0.5
    sigma: NonNegative = 1.0

    @property
    def cost(self) -> int:
        """The cost in gradients: one a copy."""
        return self.copies

    def wrap(self, inner: Oracle) -> Oracle:
        """Return an oracle that takes the gradient at each spectrum."""
        return TransformedOracle(inner, "ssa", self.copies, self._transform)

    def _transform(self, rows: Rows, x: Images, number: int) -> Images:
        noise = split_rng(rows, "ssa-noise", number).rng.normal(*x.shape[1:]).to(x)
        scale = 1 + self.rho * (2 * split_rng(rows, "ssa-scale", number).rng.uniform(*x.shape[1:]).to(x) - 1)
        high, wide = cosines(x.shape[2]).to(x), cosines(x.shape[3]).to(x)
        spectrum = high @ (x + self.sigma * per_pixel(rows.threat, x) * noise) @ wide.T
        return high.T @ (scale * spectrum) @ wide


@functools.cache
def cosines(length: int) -> Tensor:
    """Return the orthogonal matrix of the cosine transform (DCT-II)."""
    positions = torch.arange(length, dtype=torch.float64)
    matrix = math.sqrt(2 / length) * torch.cos(math.pi / length * (positions[None, :] + 0.5) * positions[:, None])
    matrix[0] /= math.sqrt(2)
    return matrix
