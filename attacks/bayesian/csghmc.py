"""Cyclical stochastic-gradient Hamiltonian Monte Carlo (Zhang et al. 2020, arXiv:1902.03932).

The settings are those of the ImageNet surrogates of Gubri et al. (2022, arXiv:2011.05074). The gradients' momentum
is kept from one cycle to the next, as in both papers' code. The noise's momentum is reset at a restart; in their
code it is kept, which moves the net far away (see `robustkit.sampling.Langevin`).
"""

from __future__ import annotations

from dataclasses import dataclass

from robustkit.attacks.bayesian.csgld import CSGLD
from robustkit.registry import method
from robustkit.registry.ranges import NonNegative, ShareBelowOne
from robustkit.training.method import Size


@method("csghmc", paper="arXiv:1902.03932")
@dataclass(frozen=True, slots=True)
class CSGHMC(CSGLD):
    """`csgld` with momentum: noise of friction 1 - momentum, the same posterior."""

    temperature: NonNegative = 0.05
    momentum: ShareBelowOne = 0.9
    weight_decay: NonNegative = 1e-4

    def default_size(self, samples: int) -> Size:
        """Return the size of Gubri et al. on ImageNet with a ResNet-50; less on a small set."""
        if samples > 5000:
            return Size(epochs=45 * self.cycles, batch_size=256, lr=0.1)
        return Size(epochs=16 * self.cycles, batch_size=64, lr=0.05)
