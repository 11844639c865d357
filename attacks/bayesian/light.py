"""How a posterior's samples are used (Gubri et al., UAI 2022, arXiv:2011.05074): some at a time, or all.

Without this technique a gradient is that of one sample of each posterior, the next one every time. The authors'
code goes through the samples in an order shuffled once for all images, as this does; theirs averages logits, and
here `combine` sets what is averaged. Surrogates that are one net stay as they are.
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
    """Lets every gradient be that of `samples` fresh samples of each posterior, each a member of the ensemble.

    The attack's loops over members go through them, too. `order` is `shuffled` or `listed`; `fresh` sets when the
    next samples come: for each `gradient`, or once in a `step`.
    """

    samples: Count = 1
    order: str = "shuffled"
    fresh: str = "gradient"

    def __post_init__(self) -> None:
        """Raise UsageError for unknown words."""
        check_word("order", self.order, ORDERS)
        check_word("fresh", self.fresh, REDRAW_TIMES)

    def prepare(self, surrogates: Surrogates) -> Surrogates:
        """Return the surrogates with so many members for each posterior."""
        return replace(expand(surrogates, self.samples), order=self.order, fresh=self.fresh)

    def wrap(self, inner: Oracle) -> Oracle:
        """Return the oracle as it is."""
        return inner
