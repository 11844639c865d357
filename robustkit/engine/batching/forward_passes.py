"""The queries of several attacks in one step, in as few passes of the model as they can share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from robustkit.attack_api import Answer, Rows, State, query_rows
from robustkit.attack_api.row_wise import finite, merge_answers
from robustkit.core.devices import ComputeDevice
from robustkit.core.shapes import Images, Logits
from robustkit.engine.batching.attack_queue import AttackQueue
from robustkit.engine.batching.row_batch import RowBatch
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.gradient_views.view_kinds import MEAN_DRAWS, MembersView

# The view that is a random model itself, averaged over draws.
AVERAGED = "averaged-mended"


@dataclass(frozen=True)
class Query:
    """The query of one attack in a step.

    Attributes:
        queue: the attack.
        batch: its rows.
        rows: what stays the same for each row.
        state: the attack's state, with the query points "x".
        needs_gradient: which rows need a gradient (B), on the host.
        exact: which rows are evaluated in float32 (B), on the host.
    """

    queue: AttackQueue
    batch: RowBatch
    rows: Rows
    state: State
    needs_gradient: np.ndarray
    exact: np.ndarray

    @classmethod
    def of(cls, queue: AttackQueue, batch: RowBatch, rows: Rows, *, deterministic: bool) -> Query:
        """Return the next query of an attack; on a `deterministic` model the last of an attempt is exact.

        The masks of the batch have been read.
        """
        closing, ended, masks = batch.host["age"] == queue.options.steps, batch.host["ended"], batch.masks
        # A row that has ended goes on like the others until results are read; its masks are those of its end.
        needs = ~closing & (masks.get("needs_gradient", True) | ended) & queue.options.needs_gradient
        if queue.separate_passes or not (deterministic and queue.options.needs_gradient):
            exact = np.zeros_like(closing)
        else:
            exact = (closing | (masks.get("last", False) & ~ended)) & ~needs
        return cls(queue, batch, rows, batch.state, needs, exact)


class Result(NamedTuple):
    """The answers to a query's rows, and the model's own logits (B K)."""

    query: Query
    answer: Answer
    logits: Logits


def run_queries(queries: Sequence[Query], instrumented: InstrumentedModel) -> list[Result]:
    """Return the results of all queries, in their order."""
    alone, together, members = list[Query](), list[Query](), list[Query]()
    for query in queries:
        if on_members(query.queue, instrumented):
            members.append(query)
        else:
            (alone if query.queue.separate_passes else together).append(query)
    results = [_run_separately(query, instrumented) for query in alone]
    results += _run_together(together, instrumented, instrumented) if together else []
    results += _run_together(members, instrumented, instrumented.members) if members else []
    return sorted(results, key=lambda result: result.query.queue.number)


def on_members(queue: AttackQueue, instrumented: InstrumentedModel) -> bool:
    """Return whether the queries of an attack share passes of an ensemble's members."""
    options = queue.options
    return instrumented.shares_passes(queue.view) and options.eot_samples == 1 and not options.vector_objective


def _run_separately(query: Query, instrumented: InstrumentedModel) -> Result:
    """Return the answers to one attack's rows and the model's own logits, of another pass if it is on a view."""
    queue, rows = query.queue, query.rows
    state = {**query.state, "needs_gradient": query.batch.upload(query.needs_gradient)}
    if not queue.view:
        answer = query_rows(queue.attack, instrumented, rows, state, True)
        return Result(query, answer, answer.logits)
    number = torch.as_tensor(rows.rng.restart) // queue.attempts(instrumented)
    parts = []
    for draw in torch.unique(number).tolist():
        index = (number == draw).nonzero()[:, 0]
        part = {name: of_rows[index] for name, of_rows in state.items()}
        parts.append(
            (index, query_rows(queue.attack, instrumented.view(queue.view, draw), rows.select(index), part, True))
        )
    answer = merge_answers(parts)
    count = deployed_passes(queue.view, random=instrumented.random)
    if not count:
        return Result(query, answer, answer.logits)
    with torch.no_grad():
        deployed = torch.stack([instrumented(state["x"]) for _ in range(count)]).mean(0)
    # The members' separate logits are used for the gradient only.
    answer = answer if answer.logits.dim() == 2 else answer._replace(logits=deployed)
    return Result(query, answer, deployed)


def deployed_passes(view: str, *, random: bool) -> int:
    """Return how often the model itself is evaluated at each query point of an attack on a view of it."""
    if view in ("", AVERAGED):
        return 0
    return MEAN_DRAWS if random else 1


def _run_together(
    queries: Sequence[Query], instrumented: InstrumentedModel, forward: Callable[[Images], Tensor]
) -> list[Result]:
    """Evaluate rows of several attacks: one pass for those that need a gradient, one or two for the others.

    Args:
        queries: of the attacks.
        instrumented: the model.
        forward: the model, or the logits of its members with its own.
    """
    x = joined([query.state["x"] for query in queries]).detach()
    needs = np.concatenate([query.needs_gradient for query in queries])
    exact = np.concatenate([query.exact for query in queries])
    sizes = [len(query.batch) for query in queries]
    groups = ((needs, forward, True), (~needs & ~exact, forward, False), (exact, instrumented.logits_fp32, False))
    passes = [_Pass.of(x, *group) for group in groups if group[0].any()]
    with torch.set_grad_enabled(bool(needs.any())):
        outputs = cut(_in_order(passes, len(x)), sizes)
        logits = [_combined(query, part, instrumented) for query, part in zip(queries, outputs, strict=True)]
        values = [
            query.queue.attack.objective(query.rows, query.state, part)
            for query, part in zip(queries, logits, strict=True)
        ]
    gradient = x.new_zeros(()).expand_as(x)
    if needs.any():
        first = passes[0]
        slope = finite(torch.autograd.grad(joined([value.flatten() for value in values]).sum(), first.x)[0])
        gradient = slope if first.index is None else torch.zeros_like(x).index_copy(0, first.index, slope)
    results = []
    shares = zip(queries, outputs, logits, values, cut(gradient, sizes), strict=True)
    for query, output, seen, value, slope in shares:
        answer = Answer(seen.detach(), value.detach(), slope if value.dim() == 1 else slope[:, None])
        own = output[:, -1].detach() if output.dim() == 3 else answer.logits
        results.append(Result(query, answer, own))
    return results


@dataclass(frozen=True)
class _Pass:
    """One pass of the model: the rows' positions (None: all), their images and the outputs."""

    index: Tensor | None
    x: Images
    outputs: Tensor

    @classmethod
    def of(cls, x: Images, mask: np.ndarray, forward: Callable[[Images], Tensor], with_gradient: bool) -> _Pass:
        """Run the rows of a mask (B)."""
        index = None if mask.all() else ComputeDevice(x.device).upload(torch.from_numpy(np.flatnonzero(mask)))
        part = x if index is None else x[index]
        with torch.set_grad_enabled(with_gradient):
            part = part.requires_grad_(with_gradient)
            return cls(index, part, forward(part))


def _in_order(passes: Sequence[_Pass], count: int) -> Tensor:
    """Return the outputs for all rows (B ...); those of the first pass may have a gradient."""
    outputs = passes[0].outputs
    if passes[0].index is None:
        return outputs
    whole = outputs.new_zeros(count, *outputs.shape[1:])
    for one in reversed(passes):
        assert one.index is not None  # noqa: S101
        whole = whole.index_copy(0, one.index, one.outputs)
    return whole


def _combined(query: Query, outputs: Tensor, instrumented: InstrumentedModel) -> Logits:
    """Return the logits that an attack sees: the model's own (B K), or its view's of the members' (B N+1 K)."""
    if outputs.dim() == 2:
        return outputs
    views = cast(Sequence[MembersView], instrumented.views[query.queue.view])
    logits = views[0].combined(outputs)
    number = query.batch.host["job"] // query.queue.attempts(instrumented)
    for part, view in enumerate(views[1:], 1):
        chosen = query.batch.upload(number == part)[:, None]
        logits = torch.where(chosen, view.combined(outputs), logits)
    return logits


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Return the rows of all parts; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def cut(rows: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """Return views of so many consecutive rows each."""
    return [rows] if len(sizes) == 1 else torch.split(rows, list(sizes))
