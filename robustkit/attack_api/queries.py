"""Queries of a model: logits, the attack's objective, and the objective's gradient in the images."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from robustkit.attack_api.rows import Answer, Model, Rows, State, select_state
from robustkit.core.criteria import Goal
from robustkit.core.shapes import Images, Labels, Logits

if TYPE_CHECKING:
    from robustkit.attack_api.row_wise import RowWise


def query(model: Model, x: Images, goal: Goal, loss: str, with_gradient: bool = True) -> Answer:
    """Return logits, loss (B) and the loss's gradient in x, by one forward and at most one backward pass.

    Args:
        model: from images to logits.
        x: images (B C H W).
        goal: the labels, and the targets if there are any.
        loss: a name of `robustkit.core.criteria`.
        with_gradient: whether to compute the gradient; else it is zero.
    """
    return _query(model, x, lambda logits: goal.loss(logits, loss), with_gradient)


def query_rows(attack: RowWise, model: Model, rows: Rows, state: State, with_gradient: bool) -> Answer:
    """Return the answers at state["x"], with gradients for the rows that need one.

    Rows whose mask `needs_gradient` in the state is False, and attacks that never need a gradient, go without.
    """
    options = attack.loop_options(rows.threat.norm)
    with_gradient = with_gradient and options.needs_gradient

    def ask(index: Tensor | None, with_gradient: bool) -> Answer:
        chosen, part = (rows, state) if index is None else (rows.select(index), select_state(state, index))
        answers = [
            _query(model, part["x"], lambda logits: attack.objective(chosen, part, logits), with_gradient)
            for _ in range(options.eot_samples)
        ]
        if len(answers) == 1:
            return answers[0]
        return Answer(*(torch.stack(parts).mean(0) for parts in zip(*answers, strict=True)))

    if "needs_gradient" not in state or not with_gradient:
        return ask(None, with_gradient)
    needs = state["needs_gradient"]
    without, wanting = (~needs).nonzero()[:, 0], needs.nonzero()[:, 0]
    if not len(without) or not len(wanting):
        return ask(None, not len(without))
    return merge_answers([(without, ask(without, False)), (wanting, ask(wanting, True))])


def merge_answers(parts: list[tuple[Tensor, Answer]]) -> Answer:
    """Return the answers to all rows, of parts with their positions, in the order of the rows."""
    if len(parts) == 1:
        return parts[0][1]
    order = torch.cat([index for index, _ in parts]).argsort()
    return Answer(*(torch.cat(fields)[order] for fields in zip(*(answer for _, answer in parts), strict=True)))


def rank(logits: Logits, labels: Labels, count: int) -> Labels:
    """Return the likeliest classes other than the label, best first, (B, min(count, K - 1))."""
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.sort(dim=1, descending=True, stable=True).indices[:, : min(count, logits.shape[1] - 1)]


def finite(gradient: Tensor) -> Tensor:
    """Return a gradient with 0 in place of infinite values and NaN, which would spoil the whole image's step."""
    return gradient.nan_to_num(0.0, 0.0, 0.0)


def _query(model: Model, x: Images, objective: Callable[[Logits], Tensor], with_gradient: bool) -> Answer:
    with torch.set_grad_enabled(with_gradient):
        x = x.detach().requires_grad_(with_gradient)
        logits = model(x)
        value = objective(logits)
        if not with_gradient:
            gradient = x.new_zeros(()).expand(*value.shape, *x.shape[1:])
        elif value.dim() == 1:
            gradient = finite(torch.autograd.grad(value.sum(), x)[0])
        else:
            columns = value.sum(0)
            slopes = [
                torch.autograd.grad(column, x, retain_graph=number + 1 < len(columns))[0]
                for number, column in enumerate(columns)
            ]
            gradient = finite(torch.stack(slopes, 1))
    return Answer(logits.detach(), value.detach(), gradient)
