"""Uses a few fresh samples of each posterior for every gradient (Gubri et al., UAI 2022, arXiv:2011.05074).

Without this technique every gradient uses one sample of each posterior, the next one each time. As in the authors'
code, the samples are used in an order that is shuffled once for all images. The authors average logits; here
`combine` sets what is averaged. Surrogates that are a single net are unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from robustkit.attack_api import Oracle, Surrogates, Technique
from robustkit.attack_api.posterior_surrogates import expand
from robustkit.attack_api.surrogates import ORDERS, REDRAW_TIMES
from robustkit.attacks.common_weakness.mi_sam import check_word
from robustkit.registry import technique
from robustkit.registry.ranges import Count


@technique("light", paper="arXiv:2011.05074")
@dataclass(frozen=True, slots=True)
class Light(Technique):
    """Every gradient uses `samples` fresh samples of each posterior; each sample is a member of the ensemble.

    Attacks that loop over members include them. `order` is `shuffled` or `listed`; `fresh` sets when the next
    samples are used: for each `gradient`, or for each `step`.
    """

    samples: Count = 1
    order: str = "shuffled"
    fresh: str = "gradient"

    def __post_init__(self) -> None:
        """Raise UsageError for an unknown `order` or `fresh`."""
        check_word("order", self.order, ORDERS)
        check_word("fresh", self.fresh, REDRAW_TIMES)

    def prepare(self, surrogates: Surrogates) -> Surrogates:
        """Return the surrogates with `samples` members for each posterior."""
        return replace(expand(surrogates, self.samples), order=self.order, fresh=self.fresh)

    def wrap(self, inner: Oracle) -> Oracle:
        """Return the oracle unchanged."""
        return inner
