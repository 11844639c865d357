"""The majority vote of a random model: draws until the share of correct ones differs from one half."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robustkit.core import criteria
from robustkit.core.shapes import Images, Labels, Logits, Mask, PerRow

# Draws at least and at most, and the probability of rejecting a share that is one half.
MIN_DRAWS, MAX_DRAWS, ERROR = 8, 64, 0.05
# Normalised logits of a model that is not random differ by less from call to call (AutoAttack's tolerance).
MAX_NOISE = 1e-4
# Seeds to test for randomness.
TRIED_SEEDS = 4


@dataclass(frozen=True)
class VoteResult:
    """The draws of a random model at B images.

    Attributes:
        right: the share of draws with the right class (B).
        once: whether the first draw was right (B).
        prediction: the class predicted most often (B).
        margin: the mean of the label's logit minus the best other one (B).
        broken: whether a draw had non-finite logits (B).
        forwards: how many draws (B).
    """

    right: PerRow
    once: Mask
    prediction: Labels
    margin: PerRow
    broken: Mask
    forwards: Labels

    def replaced(self, mask: Mask, other: VoteResult) -> VoteResult:
        """Return these with the rows of another where the mask is True; forwards and broken rows add up."""
        fields = {name: value.masked_scatter(mask, getattr(other, name)) for name, value in vars(self).items()}
        fields["broken"] = self.broken | fields["broken"]
        fields["forwards"] = self.forwards + fields["forwards"] * mask
        return VoteResult(**fields)


def majority_vote(model: Callable[[Images], Logits], x: Images, labels: Labels) -> VoteResult:
    """Draw from a random model until it is known for each image whether more than half of its draws are correct.

    An image is done once a test that is valid after every draw rejects a share of one half (a Beta mixture
    martingale, e.g. arXiv:2010.09686), or after `MAX_DRAWS` draws.

    Args:
        model: returns logits (B K) by a new draw.
        x: images (B C H W).
        labels: of these (B).
    """
    count = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    hits, total = count.clone(), count.double()
    once, broken = count.bool(), count.bool()
    votes: Tensor | None = None
    rows = torch.arange(len(x), device=x.device)
    for draw in range(MAX_DRAWS):
        logits = model(x[rows])
        if votes is None:
            votes = logits.new_zeros(len(x), logits.shape[1])
        predicted = logits.argmax(1)
        right = predicted == labels[rows]
        broken[rows] |= ~logits.isfinite().all(1)
        votes[rows, predicted] += 1
        count[rows] += 1
        hits[rows] += right
        total[rows] -= criteria.margin(logits, labels[rows]).double()
        if not draw:
            once = right
        if draw + 1 >= MIN_DRAWS:
            rows = rows[~_is_decided(hits[rows], count[rows])]
        if not len(rows):
            break
    prediction = labels if votes is None else votes.argmax(1)
    each = count.clamp(min=1)
    return VoteResult(hits.double() / each, once, prediction, total / each, broken, count)


def is_random(model: Callable[[Images], Logits], x: Images) -> bool:
    """Return whether a model's logits depend on the random generators, which the caller isolates.

    It gets one image at a time, as there may be no memory for more.
    """
    outputs = []
    for seed in range(TRIED_SEEDS):
        for start in (torch.manual_seed, np.random.seed, random.seed):
            start(seed)
        with torch.no_grad():
            logits = torch.cat([model(image) for image in torch.split(x, 1)])
        outputs.append(logits / logits.norm(dim=1, keepdim=True).clamp(min=1e-10))
    return any(bool((one - outputs[0]).norm(dim=1).max() > MAX_NOISE) for one in outputs[1:])


def _is_decided(hits: Tensor, count: Tensor) -> Mask:
    """Return whether these hits in this many draws rule out a share of one half, at any number of draws."""
    n, k = count.double(), hits.double()
    mixture = torch.lgamma(k + 1) + torch.lgamma(n - k + 1) - torch.lgamma(n + 2)
    return mixture + n * math.log(2) >= -math.log(ERROR)
