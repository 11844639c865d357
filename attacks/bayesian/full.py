"""Every gradient uses all samples of a posterior (Gubri et al., UAI 2022, arXiv:2011.05074); see `light`."""

from __future__ import annotations

from dataclasses import dataclass

from robustkit.attack_api import Oracle, Surrogates, Technique
from robustkit.attack_api.posterior_surrogates import expand
from robustkit.registry import technique


@technique("full", paper="arXiv:2011.05074")
@dataclass(frozen=True, slots=True)
class Full(Technique):
    """Makes every sample of a posterior a member of the ensemble; costs one gradient for each sample."""

    def prepare(self, surrogates: Surrogates) -> Surrogates:
        """Return the surrogates with a member for each sample."""
        return expand(surrogates, None)

    def wrap(self, inner: Oracle) -> Oracle:
        """Return the oracle as it is."""
        return inner
