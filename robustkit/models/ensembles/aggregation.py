"""Aggregators: functions that combine the logits of several predictors (B N K) to logits (B K).

`crossmax` is that of Fort & Lakshminarayanan 2024 (arXiv:2408.05446), Algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from robustkit.core.errors import UsageError, did_you_mean
from robustkit.core.shapes import Logits

Aggregator = Callable[[Tensor], Logits]


def probabilities(stack: Tensor) -> Logits:
    """Return the logarithm of the mean of the probabilities; finite if a predictor is certain."""
    return stack.log_softmax(2).logsumexp(1) - math.log(stack.shape[1])


def logits(stack: Tensor) -> Logits:
    """Return the mean of the logits."""
    return stack.mean(1)


def vote(stack: Tensor) -> Logits:
    """Return the votes for each class; ties are broken by the mean probability, which has the only gradient."""
    named = F.one_hot(stack.argmax(2), stack.shape[2])
    return named.to(stack.dtype).sum(1) + probabilities(stack).exp() / 2


def median(stack: Tensor) -> Logits:
    """Return the median of each class's logits, the lower of the two middle ones for an even number."""
    return stack.median(1).values


def crossmax(stack: Tensor, k: int | None = None) -> Logits:
    """Return the k-th largest, without k the median (see `median`), of logits less two maxima.

    First each predictor's largest logit is subtracted, then each class's largest over all predictors.

    Raises:
        UsageError: for one predictor or k = 1, where all classes have equal values, or fewer predictors than k.
    """
    count = stack.shape[1]
    if count < 2 or (k is not None and not 2 <= k <= count):
        raise UsageError(
            f"crossmax of {count} predictors, k = {k}: it takes at least 2 predictors, and a k from 2 to their "
            "number."
        )
    apart = stack - stack.amax(2, keepdim=True)
    apart = apart - apart.amax(1, keepdim=True)
    if k is None:
        return median(apart)
    return apart.sort(1, descending=True).values[:, k - 1]


AGGREGATORS: dict[str, Aggregator] = {
    "probabilities": probabilities,
    "logits": logits,
    "vote": vote,
    "median": median,
    "crossmax": crossmax,
}


def parse_aggregator(text: str) -> Aggregator:
    """Return an aggregator by its name; `crossmax:3` is that of the third largest.

    Raises:
        UsageError: for an unknown name, or a k that is no whole number from 2.
    """
    name, sign, k = text.partition(":")
    if name not in AGGREGATORS:
        raise did_you_mean("combine", name, tuple(AGGREGATORS))
    if not sign:
        return AGGREGATORS[name]
    # No ensemble has a five-digit number of members, and Python refuses to read numbers of thousands of digits.
    if name != "crossmax" or not k.isdecimal() or len(k) > 4 or int(k) < 2:
        raise UsageError(
            f"combine={text[:30]} is not possible: only crossmax takes a number, from 2 to 9999, as in crossmax:3."
        )
    return partial(crossmax, k=int(k))
