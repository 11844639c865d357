"""The loop that every iterative search of the package runs in."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

S = TypeVar("S")
A = TypeVar("A")


def drive(
    state: S,
    steps: int,
    query: Callable[[int, S], A],
    step: Callable[[int, S, A], S],
    observe: Callable[[S, A], tuple[S, A] | None] | None = None,
) -> S:
    """Alternate queries and steps, and return the last state.

    The loop knows neither models nor attacks: the caller decides what a query is (a forward and backward pass, the
    gradient of an ensemble, one pass for the rows of several attacks) and what is observed of its result.

    Args:
        state: before the first query.
        steps: how many steps are taken, at least 0.
        query: from the number of the step (from 0) and the state to a result.
        step: from the number of the step, the state and the result to the next state.
        observe: called with each state and result, with those after the last step too. It returns them, for the
            rows that go on, or None to end the loop.

    Example:
        >>> drive(1.0, 3, query=lambda number, x: -2 * x, step=lambda number, x, slope: x + 0.25 * slope)
        0.125
    """
    for number in range(steps if observe is None else steps + 1):
        result = query(number, state)
        if observe is not None:
            kept = observe(state, result)
            if kept is None:
                break
            state, result = kept
        if number < steps:
            state = step(number, state, result)
    return state
