"""Substitutes of an ensemble's aggregator that do not hide the gradients of its members.

They are functions of the predictors' stacked logits (B N K). The evaluation of CrossMax was corrected with mean
logits in its place (Zhang et al. 2024, arXiv:2411.14834).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from robustkit.gradient_views.straight_through import with_gradient_of

Substitute = Callable[[Tensor], Tensor]

# The most predictors that get a substitute of their own.
MAX_SINGLE_MEMBERS = 4
# Number of largest log-probabilities of each class that `top_mean` averages.
TOP_K = 3
TEMPERATURE = 1.0


def mean_logit(stack: Tensor) -> Tensor:
    """Return the mean logits."""
    return stack.mean(1)


def mean_log_probability(stack: Tensor) -> Tensor:
    """Return the mean log-probabilities."""
    return stack.log_softmax(2).mean(1)


def top_mean(stack: Tensor) -> Tensor:
    """Return the mean of the three largest log-probabilities of each class."""
    return stack.log_softmax(2).topk(min(TOP_K, stack.shape[1]), 1).values.mean(1)


def soft_top(stack: Tensor) -> Tensor:
    """Return the mean log-probability of each class, weighted by the softmax over the predictors."""
    logs = stack.log_softmax(2)
    return (logs * (logs / TEMPERATURE).softmax(1)).sum(1)


def single_member(number: int) -> Substitute:
    """Return the substitute that uses one predictor."""
    return lambda stack: stack[:, number]


def substitutes(count: int) -> dict[str, Substitute]:
    """Return the substitutes for this number of predictors, by name."""
    return {
        "mean-logit": mean_logit,
        "mean-log-probability": mean_log_probability,
        "top-k": top_mean,
        "soft-top-k": soft_top,
        **{f"member-{number}": single_member(number) for number in range(min(count, MAX_SINGLE_MEMBERS))},
    }


def find_ensemble(net: nn.Module) -> nn.Module | None:
    """Return the outermost module of a net that has `stacked(x) -> (B N K)`; None without one."""
    return next((part for part in net.modules() if callable(getattr(part, "stacked", None))), None)


@contextmanager
def combined_by(part: nn.Module, entry: Substitute, *, is_straight_through: bool = False) -> Iterator[None]:
    """Replace the aggregator of an ensemble inside the context.

    Args:
        part: module with `stacked(x) -> (B N K)`.
        entry: the substitute.
        is_straight_through: keep the ensemble's own logits, with the gradient of the substitute.
    """
    original = part.forward

    def forward(x: Tensor) -> Tensor:
        stack = part.stacked(x)  # type: ignore[operator]
        combination = entry(stack)
        if not is_straight_through:
            return combination
        with torch.no_grad():
            return with_gradient_of(original(x), combination)

    own: Any = part.__dict__.get("forward")
    part.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del part.__dict__["forward"]
        else:
            part.__dict__["forward"] = own


def members_and_output(model: nn.Module, x: Tensor, *layout: torch.memory_format) -> Tensor:
    """Return the logits of an ensemble's members, then its own (B N+1 K), of one forward pass.

    Args:
        model: a classifier whose net has `stacked(x) -> (B N K)` and calls it.
        x: images (B C H W).
        layout: the memory layout in which the net gets them; none for the model's own.

    Raises:
        RuntimeError: if the net did not call `stacked`.
    """
    part: Any = model.net
    stacks: list[Tensor] = []
    compute, own = part.stacked, part.__dict__.get("stacked")

    def stacked(images: Tensor) -> Tensor:
        stack: Tensor = compute(images)
        stacks.append(stack)
        return stack

    part.__dict__["stacked"] = stacked
    try:
        output: Tensor = model(x, *layout)
    finally:
        if own is None:
            del part.__dict__["stacked"]
        else:
            part.__dict__["stacked"] = own
    if sum(map(len, stacks)) < len(x):
        raise RuntimeError("the ensemble did not call stacked().")
    # A net of a fixed batch size gets the last batch filled up.
    stack = torch.cat(stacks)[: len(x)]
    return torch.cat([stack.to(output.dtype), output[:, None]], 1)
