"""An ensemble with its aggregator replaced: what its weights say, without what its rule hides.

`RUNGS` are functions of the predictors' stacked logits (B N K). Mean logits in place of CrossMax are how its
evaluations were corrected (Zhang et al. 2024, arXiv:2411.14834).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from robustkit.gradient_views.straight_through import through

Substitute = Callable[[Tensor], Tensor]

# How many predictors are shown alone.
ALONE = 4
TOP = 3
TEMPERATURE = 1.0


def mean_logit(stack: Tensor) -> Tensor:
    """Return the mean of the logits."""
    return stack.mean(1)


def mean_log_probability(stack: Tensor) -> Tensor:
    """Return the mean of the log-probabilities."""
    return stack.log_softmax(2).mean(1)


def top_mean(stack: Tensor) -> Tensor:
    """Return, of each class, the mean of its three largest log-probabilities."""
    return stack.log_softmax(2).topk(min(TOP, stack.shape[1]), 1).values.mean(1)


def soft_top(stack: Tensor) -> Tensor:
    """Return, of each class, its log-probabilities' mean weighted by their own softmax."""
    logs = stack.log_softmax(2)
    return (logs * (logs / TEMPERATURE).softmax(1)).sum(1)


def alone(number: int) -> Substitute:
    """Return the rung that is one predictor."""
    return lambda stack: stack[:, number]


def substitutes(count: int) -> dict[str, Substitute]:
    """Return the rungs for so many predictors, by their names."""
    return {
        "mean-logit": mean_logit,
        "mean-log-probability": mean_log_probability,
        "top-k": top_mean,
        "soft-top-k": soft_top,
        **{f"member-{number}": alone(number) for number in range(min(count, ALONE))},
    }


def ensemble(net: nn.Module) -> nn.Module | None:
    """Return the outermost part of a net that gives its predictors' logits by `stacked(x)`; None without one."""
    return next((part for part in net.modules() if callable(getattr(part, "stacked", None))), None)


@contextmanager
def combined(part: nn.Module, entry: Substitute, *, straight: bool = False) -> Iterator[None]:
    """Let an ensemble combine its predictors by this rung inside; straight, only for its gradient."""
    deployed = part.forward

    def forward(x: Tensor) -> Tensor:
        stack = part.stacked(x)  # type: ignore[operator]
        combination = entry(stack)
        if not straight:
            return combination
        with torch.no_grad():
            return through(deployed(x), combination)

    own: Any = part.__dict__.get("forward")
    part.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del part.__dict__["forward"]
        else:
            part.__dict__["forward"] = own
