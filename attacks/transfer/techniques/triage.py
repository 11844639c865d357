"""Weights members by their margins: those almost fooled count most, those far from it not at all.

No paper: it was developed here. If some surrogates are adversarially trained and others not, one direction for all
of them gains little on robust members that cannot be fooled on an image, and fails on the others. So members are
weighted for each image by their margins, in units of the standard deviation of their logits: a member whose margin
is below `safe` counts `stake` times; after the share `after` of the steps, a member whose margin is below `hope`
is ignored for the rest of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robustkit.attack_api import Oracle, OracleWrapper, Rows, Technique, Weights
from robustkit.attack_api.surrogates import logit_spread
from robustkit.core.shapes import Images
from robustkit.registry import technique
from robustkit.registry.ranges import Positive, Share


@technique("triage", paper="docs/transfer.md")
@dataclass(frozen=True, slots=True)
class Triage(Technique):
    """Weights the surrogates for each image by their margins, and drops those that cannot be fooled.

    A surrogate that is not fooled yet counts `stake` times.

    Margins are of each image's logits over their standard deviation, above 0 where the goal is reached: `safe` is
    the margin of a member that counts as fooled, `hope` the least one of a member that is kept after `after` of
    the steps. If no member is left all are kept. Costs nothing. Gradients of single members are unchanged.
    """

    stake: Positive = 4.0
    safe: float = 1.0
    hope: float = -0.25
    after: Share = 0.5

    def wrap(self, inner: Oracle) -> Oracle:
        """Return an oracle that weights the members."""
        return _Triage(inner, self)


class _Triage(OracleWrapper):
    def __init__(self, inner: Oracle, technique: Triage) -> None:
        super().__init__(inner)
        self.technique = technique
        self.kept: Tensor | None = None

    def gradient(
        self, rows: Rows, x: Images, members: Sequence[int] | None = None, weights: Weights = None
    ) -> Images:
        if members is not None or weights is not None or len(self.surrogates) == 1:
            return self.inner.gradient(rows, x, members, weights)
        return self.inner.gradient(rows, x, None, lambda logits: self._weights(rows, logits))

    def _weights(self, rows: Rows, logits: Tensor) -> Tensor:
        """Return the weights of the members, (n B), which sum to 1."""
        settings = self.technique
        margins = torch.stack([rows.aim.loss(member, "margin") for member in logits])
        margins = margins / logit_spread(logits)
        own = self.surrogates.shares(range(len(logits)), None, logits[0])
        worth = own * torch.where(margins < settings.safe, settings.stake, 1.0)
        if rows.rng.step > settings.after * self.steps:
            near = margins > settings.hope
            self.kept = near if self.kept is None else self.kept & near
            worth = worth * (self.kept | ~self.kept.any(0))
        return worth / worth.sum(0)
