"""Admix (Wang et al. 2021, arXiv:2102.00436): the mean gradient over images with a little of others mixed in.

The paper draws the others from other classes of the batch, the authors' code from the whole batch. Here they are
drawn for each image from the pool of the run (`Surrogates.pool`), so that the batch does not matter, and from any
class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from robustkit.attack_api import Oracle, Rows, Surrogates, Technique, TransformedOracle, split_rng
from robustkit.core.errors import UsageError
from robustkit.core.limits import Limits
from robustkit.core.shapes import Images
from robustkit.registry import technique
from robustkit.registry.ranges import Count, Share


@technique("admix", paper="arXiv:2102.00436")
@dataclass(frozen=True, slots=True)
class Admix(Technique):
    """Mixes in `share` of each of `mixes` other images, at `scales` scales; costs mixes * scales gradients."""

    mixes: Count = 3
    share: Share = 0.2
    scales: Annotated[int, Limits(1, 64)] = 5

    @property
    def cost(self) -> int:
        """The cost in gradients: one for each mix at each scale."""
        return self.mixes * self.scales

    def prepare(self, surrogates: Surrogates) -> Surrogates:
        """Return the surrogates unchanged, if they have a pool."""
        if surrogates.pool is None or not len(surrogates.pool):
            raise UsageError("admix mixes in other images of the run, but there are none: give Surrogates a pool.")
        return surrogates

    def wrap(self, inner: Oracle) -> Oracle:
        """Return an oracle that takes the gradient at each mix and scale."""
        pool = inner.surrogates.pool
        if pool is None:
            raise RuntimeError("prepare has not been called.")

        def transform(rows: Rows, x: Images, number: int) -> Images:
            if pool.shape[1:] != x.shape[1:]:
                raise UsageError(
                    f"admix: the pool's images are {tuple(pool.shape[1:])}, the others {tuple(x.shape[1:])}: "
                    "give images of one size."
                )
            mix, scale = divmod(number, self.scales)
            partner = split_rng(rows, "admix", mix).rng.integers(len(pool))
            mixed: Images = (x + self.share * pool[partner.to(pool.device)].to(x)) / 2**scale
            return mixed

        return TransformedOracle(inner, "admix", self.cost, transform)
