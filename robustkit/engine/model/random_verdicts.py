"""How often a random model is right at a point, by as many fresh draws as it takes to tell from one half."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robustkit.core import losses
from robustkit.core.shapes import Images, Labels, Logits, Mask, PerRow

# Draws at least and at most, and the chance that a share of one half is taken for another.
LEAST, MOST, ERROR = 8, 64, 0.05
# Normalised logits of a model that is not random differ by less from call to call; AutoAttack's tolerance.
NOISE = 1e-4
SEEDS = 4


@dataclass(frozen=True)
class VoteResult:
    """What draws said of points: the share that was `right` (B), whether the first was, the means, the cost.

    `prediction` is the class named most often, `margin` the mean of the label's logit less the best other one.
    """

    right: PerRow
    once: Mask
    prediction: Labels
    margin: PerRow
    broken: Mask
    forwards: Labels

    def replaced(self, mask: Mask, other: VoteResult) -> VoteResult:
        """Return these with the others where the mask is; forwards and what broke add up."""
        fields = {name: value.masked_scatter(mask, getattr(other, name)) for name, value in vars(self).items()}
        fields["broken"] = self.broken | fields["broken"]
        fields["forwards"] = self.forwards + fields["forwards"] * mask
        return VoteResult(**fields)


def majority_vote(answer: Callable[[Images], Logits], x: Images, labels: Labels) -> VoteResult:
    """Ask a random model again and again until it is known whether it is right more often than not.

    Rows leave once a test that may look after every draw rejects a share of one half (a Beta mixture martingale,
    e.g. arXiv:2010.09686), the others after `MOST` draws. `answer` gives logits (B K) by a fresh draw.
    """
    count = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    hits, total = count.clone(), count.double()
    once, broken = count.bool(), count.bool()
    votes: Tensor | None = None
    rows = torch.arange(len(x), device=x.device)
    for draw in range(MOST):
        logits = answer(x[rows])
        if votes is None:
            votes = logits.new_zeros(len(x), logits.shape[1])
        named = logits.argmax(1)
        right = named == labels[rows]
        broken[rows] |= ~logits.isfinite().all(1)
        votes[rows, named] += 1
        count[rows] += 1
        hits[rows] += right
        total[rows] -= losses.margin(logits, labels[rows]).double()
        if not draw:
            once = right
        if draw + 1 >= LEAST:
            rows = rows[~_told(hits[rows], count[rows])]
        if not len(rows):
            break
    prediction = labels if votes is None else votes.argmax(1)
    each = count.clamp(min=1)
    return VoteResult(hits.double() / each, once, prediction, total / each, broken, count)


def is_random(answer: Callable[[Images], Logits], x: Images) -> bool:
    """Return whether a model answers differently when the generators stand elsewhere; the caller isolates them.

    It is asked about one image at a time, as there may be no memory for more.
    """
    found = []
    for seed in range(SEEDS):
        for start in (torch.manual_seed, np.random.seed, random.seed):
            start(seed)
        with torch.no_grad():
            logits = torch.cat([answer(image) for image in torch.split(x, 1)])
        found.append(logits / logits.norm(dim=1, keepdim=True).clamp(min=1e-10))
    return any(bool((one - found[0]).norm(dim=1).max() > NOISE) for one in found[1:])


def _told(hits: Tensor, count: Tensor) -> Mask:
    """Return whether so many hits in so many draws rule out a share of one half, however often one has looked."""
    n, k = count.double(), hits.double()
    mixture = torch.lgamma(k + 1) + torch.lgamma(n - k + 1) - torch.lgamma(n + 2)
    return mixture + n * math.log(2) >= -math.log(ERROR)
