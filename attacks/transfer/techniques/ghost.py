"""Ghost networks by skip connection erosion (Li et al. 2020, arXiv:1812.03413): a random net for every gradient.

Every skip connection is multiplied by one number, drawn for each image in each forward pass.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from robustkit.attack_api import Oracle, Surrogates, Technique
from robustkit.core.rng import RowRng
from robustkit.models.layers import residual
from robustkit.registry import technique
from robustkit.registry.ranges import Share


@technique("ghost", paper="arXiv:1812.03413")
@dataclass(frozen=True, slots=True)
class Ghost(Technique):
    """Multiplies skips by numbers from [1 - `erosion`, 1 + `erosion`]; costs nothing."""

    erosion: Share = 0.22

    def prepare(self, surrogates: Surrogates) -> Surrogates:
        """Return the surrogates with eroded skips."""
        return replace(surrogates, forward_hooks=(*surrogates.forward_hooks, self._hook))

    def wrap(self, inner: Oracle) -> Oracle:
        """Return the oracle unchanged."""
        return inner

    def _hook(self, model: Any, rng: RowRng) -> AbstractContextManager[object]:
        draws = replace(rng, stream=f"{rng.stream}/ghost").uniform(residual.skips(model))
        return residual.eroded(model, 1 + self.erosion * (2 * draws - 1))
