"""Properties of an aggregator, measured on a few thousand random logits; no data, no model.

Logits are standard normal, independent. The results show how an aggregator behaves, not how well a
model with it does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from robustkit.core.errors import UsageError
from robustkit.models.ensembles.aggregation import Aggregator, parse_aggregator

DRAWS, CASES = 4000, 200
# The logits of predictors that an attacker controls, and the lead of the correct class in the others.
FORCED_LOGIT, CORRECT_LEAD = 1e6, 10.0


@dataclass(frozen=True)
class FactSheet:
    """The facts of an aggregator of so many predictors and classes.

    Attributes:
        aggregator: its name.
        predictors: N.
        classes: K.
        draws: random logits (N K) that shares are of.
        invariances: changes of the logits, and whether the differences between classes are unchanged; if classes
            are permuted, shifted or scaled together, the result must be permuted, shifted or scaled.
        plateau: share of draws in which the score of the winning class has no gradient at all.
        ties: share of draws in which two classes or more share the highest score; the lower number then wins.
        unpredicted: share of draws won by a class that no predictor predicts.
        partials: the most logits that the winning class's score depends on, of N * K.
        predictors_to_tie: the fewest controlled predictors whose class ties with that of all others; None if all
            are needed.
        predictors_to_win: the fewest whose class wins; None if all are needed.
    """

    aggregator: str
    predictors: int
    classes: int
    draws: int
    invariances: Mapping[str, bool]
    plateau: float
    ties: float
    unpredicted: float
    partials: int
    predictors_to_tie: int | None
    predictors_to_win: int | None


# Of all predictors for one image; a few thousand images are drawn.
MAX_SCORES = 20_000


def fact_sheet(aggregator: str, predictors: int, classes: int, seed: int = 0) -> FactSheet:
    """Return the facts of an aggregator by its name; the same seed gives the same sheet.

    Raises:
        UsageError: for an unknown name, fewer than two predictors or classes, or a k above the predictors.
    """
    if predictors < 2 or classes < 2:
        raise UsageError(
            f"{predictors} predictors and {classes} classes: an aggregator needs two of each; write 2 or more."
        )
    if predictors * classes > MAX_SCORES:
        raise UsageError(
            f"{predictors} predictors of {classes} classes: write numbers with a product up to {MAX_SCORES}."
        )
    combine = parse_aggregator(aggregator)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    stack = draw(DRAWS, predictors, classes).requires_grad_()
    combined = combine(stack)
    best, winner = combined.detach().max(1)
    (slope,) = torch.autograd.grad(combined.gather(1, winner[:, None]).sum(), stack, materialize_grads=True)
    touched = (slope != 0).flatten(1).sum(1)
    named = stack.detach().argmax(2)
    predictors_to_tie, predictors_to_win = _breakdown(combine, draw(CASES, predictors, classes))
    return FactSheet(
        aggregator=aggregator,
        predictors=predictors,
        classes=classes,
        draws=DRAWS,
        invariances=_invariances(combine, stack.detach()[:CASES], draw, generator),
        plateau=_share(touched == 0),
        ties=_share((combined.detach() == best[:, None]).sum(1) > 1),
        unpredicted=_share(~(named == winner[:, None]).any(1)),
        partials=int(touched.max()),
        predictors_to_tie=predictors_to_tie,
        predictors_to_win=predictors_to_win,
    )


def _invariances(
    combine: Aggregator, stack: Tensor, draw: Callable[..., Tensor], generator: torch.Generator
) -> dict[str, bool]:
    _, predictors, classes = stack.shape
    plain = combine(stack)
    first = torch.zeros(predictors, 1, dtype=stack.dtype)
    first[0] = 1
    order = torch.randperm(predictors, generator=generator)
    # In reversed order every class has another number, but for the middle one of an odd number of classes.
    reversed_classes = torch.arange(classes).flip(0)
    raised = draw(1, 1, classes)
    return {
        "constant on one predictor": _alike(combine(stack + 3 * first), plain),
        "factor on one predictor": _alike(combine(stack * (1 + 2 * first)), plain),
        "factor on all predictors": _alike(combine(3 * stack), 3 * plain),
        "constant on one class": _alike(combine(stack + raised), plain + raised[0]),
        "order of predictors": _alike(combine(stack[:, order]), plain),
        "names of classes": _alike(combine(stack[:, :, reversed_classes]), plain[:, reversed_classes]),
    }


def _alike(one: Tensor, other: Tensor) -> bool:
    """Return whether the differences between the classes' scores are equal in both."""
    return torch.allclose(one - one.amax(1, keepdim=True), other - other.amax(1, keepdim=True), atol=1e-9)


def _breakdown(combine: Aggregator, stack: Tensor) -> tuple[int | None, int | None]:
    """Return how many predictors that predict class 1 tie with, and beat, the others, which predict class 0."""
    predictors = stack.shape[1]
    correct = stack.clone()
    correct[:, :, 0] = correct.amax(2) + CORRECT_LEAD
    forced = torch.full_like(correct, -FORCED_LOGIT)
    forced[:, :, 1] = FORCED_LOGIT
    tied = taken = None
    for count in range(predictors - 1, 0, -1):
        combined = combine(torch.cat([forced[:, :count], correct[:, count:]], 1))
        ahead = combined[:, 1] - combined[:, 0]
        tied = count if bool((ahead >= 0).any()) else tied
        taken = count if bool((ahead > 0).any()) else taken
    return tied, taken


def _share(values: Tensor) -> float:
    return float(values.double().mean())
