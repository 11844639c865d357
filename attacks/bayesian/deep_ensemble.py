"""Deep ensembles (Lakshminarayanan et al. 2017, arXiv:1612.01474): equal nets trained from different seeds.

The baseline for the transfer of posterior samples. The paper's adversarial training of the members is not
included, as in the ensembles of Gubri et al. (2022, arXiv:2011.05074). The members are trained on the data in the
same order.
"""

from __future__ import annotations

from dataclasses import dataclass

from robustkit.registry import method
from robustkit.registry.ranges import NonNegative, ShareBelowOne
from robustkit.sampling import cosine
from robustkit.training.method import Method, Plan, Size


@method("deep-ensemble", paper="arXiv:1612.01474")
@dataclass(frozen=True, slots=True)
class DeepEnsemble(Method):
    """Trains `--members` nets in one run, each by SGD with momentum and one cosine of the learning rate."""

    momentum: ShareBelowOne = 0.9
    weight_decay: NonNegative = 5e-4

    ensembles = True

    def default_size(self, samples: int) -> Size:
        """Return a common training size for five nets; a shorter run on a small set."""
        if samples > 5000:
            return Size(epochs=100, batch_size=128, lr=0.1, members=5)
        return Size(epochs=30, batch_size=64, lr=0.05, members=5)

    def rate(self, step: int, plan: Plan) -> float:
        """Return the learning rate: half a cosine from `lr` to 0."""
        return cosine(step, plan.steps, plan.lr)
