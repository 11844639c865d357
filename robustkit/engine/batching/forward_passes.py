"""The queries of several attacks in one step, in as few passes of the model as they can share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from robustkit.attack_api import Answer, Rows, State, query_rows
from robustkit.attack_api.row_wise import finite, merge_answers
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
        separate: whether it cannot share a pass with the queries of other attacks.
        needs_gradient: which rows need a gradient (B), on the host.
        exact: which rows are evaluated in float32 (B), on the host.
    """

    queue: AttackQueue
    batch: RowBatch
    rows: Rows
    state: State
    separate: bool
    needs_gradient: Tensor
    exact: Tensor

    @classmethod
    def of(cls, queue: AttackQueue, batch: RowBatch, rows: Rows, *, deterministic: bool) -> Query:
        """Return the next query of an attack; on a `deterministic` model the last of an attempt is exact."""
        state, separate = batch.state, queue.separate_passes
        closing = torch.from_numpy(batch.host["age"] == queue.options.steps)
        needs = ~closing
        if not queue.options.needs_gradient:
            needs = torch.zeros_like(needs)
        elif "needs_gradient" in state:
            needs = needs & state["needs_gradient"].cpu()
        if separate:
            return cls(queue, batch, rows, state, separate, needs, torch.zeros_like(needs))
        if "last" in state:
            closing = closing | state["last"].cpu()
        exact = closing & ~needs if deterministic and queue.options.needs_gradient else torch.zeros_like(needs)
        return cls(queue, batch, rows, state, separate, needs, exact)

    def rows_with(self, gradient: bool, exact: bool) -> Tensor:
        """Return the positions of the rows with a gradient, or of those without one, in float32 or not."""
        mask = self.needs_gradient if gradient else ~self.needs_gradient & (self.exact == exact)
        return mask.nonzero()[:, 0].to(self.rows.x.device)

    def objective(self, index: Tensor, logits: Tensor) -> Tensor:
        """Return the attack's objective for these rows."""
        rows, state = self.rows, self.state
        if len(index) < len(rows.x):
            rows, state = rows.select(index), {name: part[index] for name, part in state.items()}
        return self.queue.attack.objective(rows, state, logits)


def run_queries(queries: Sequence[Query], instrumented: InstrumentedModel) -> list[tuple[Query, Answer, Logits]]:
    """Return each query with an answer for every row, and the model's own logits."""
    members = [query for query in queries if on_members(query.queue, instrumented)]
    separate = [query for query in queries if query.separate and query not in members]
    alone = [(query, *_run_separately(query, instrumented)) for query in separate]
    together = _run_together([query for query in queries if not query.separate], instrumented, instrumented)
    return alone + together + _run_together(members, instrumented, instrumented.members)


def on_members(queue: AttackQueue, instrumented: InstrumentedModel) -> bool:
    """Return whether the queries of an attack share passes of an ensemble's members."""
    options = queue.options
    return instrumented.shares_passes(queue.view) and options.eot_samples == 1 and not options.vector_objective


def _run_separately(query: Query, instrumented: InstrumentedModel) -> tuple[Answer, Logits]:
    """Return the answers to one attack's rows and the model's own logits, of another pass if it is on a view."""
    queue, rows = query.queue, query.rows
    state = {**query.state, "needs_gradient": query.needs_gradient.to(rows.x.device)}
    if not queue.view:
        answer = query_rows(queue.attack, instrumented, rows, state, True)
        return answer, answer.logits
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
        return answer, answer.logits
    with torch.no_grad():
        deployed = torch.stack([instrumented(state["x"]) for _ in range(count)]).mean(0)
    # The members' separate logits are used for the gradient only.
    return (answer if answer.logits.dim() == 2 else answer._replace(logits=deployed)), deployed


def deployed_passes(view: str, *, random: bool) -> int:
    """Return how often the model itself is evaluated at each query point of an attack on a view of it."""
    if view in ("", AVERAGED):
        return 0
    return MEAN_DRAWS if random else 1


def _run_together(
    queries: list[Query], instrumented: InstrumentedModel, forward: Callable[[Images], Tensor]
) -> list[tuple[Query, Answer, Logits]]:
    """Evaluate rows of several attacks: one pass for those that need a gradient, one or two for the others.

    Args:
        queries: of the attacks.
        instrumented: the model.
        forward: the model, or the logits of its members with its own.
    """
    parts: list[list[tuple[Tensor, Answer, Logits]]] = [[] for _ in queries]
    for with_gradient, exact in ((True, False), (False, False), (False, True)):
        members = [
            (found, query, query.rows_with(with_gradient, exact))
            for found, query in zip(parts, queries, strict=True)
        ]
        members = [member for member in members if len(member[2])]
        if not members:
            continue
        x = torch.cat([query.state["x"][index] for _, query, index in members])
        cuts = [len(index) for *_, index in members]
        with torch.set_grad_enabled(with_gradient):
            x = x.detach().requires_grad_(with_gradient)
            outputs = _cut(instrumented.logits_fp32(x) if exact else forward(x), cuts)
            logits = [
                _combined(query, index, part, instrumented)
                for (_, query, index), part in zip(members, outputs, strict=True)
            ]
            values = [
                query.objective(index, part) for (_, query, index), part in zip(members, logits, strict=True)
            ]
            gradient = x.new_zeros(()).expand_as(x)
            if with_gradient:
                total = torch.cat([v.flatten() for v in values]).sum()
                gradient = finite(torch.autograd.grad(total, x)[0])
        shares = zip(members, values, logits, outputs, _cut(gradient, cuts), strict=True)
        for (found, _, index), value, seen, output, slope in shares:
            answer = Answer(seen.detach(), value.detach(), slope if value.dim() == 1 else slope[:, None])
            own = output[:, -1].detach() if output.dim() == 3 else answer.logits
            found.append((index, answer, own))
    return [(query, *_merged(found)) for query, found in zip(queries, parts, strict=True)]


def _combined(query: Query, index: Tensor, outputs: Tensor, instrumented: InstrumentedModel) -> Logits:
    """Return the logits that an attack sees on these rows: the model's own (B K), or its view's of (B N+1 K)."""
    if outputs.dim() == 2:
        return outputs
    views = cast(Sequence[MembersView], instrumented.views[query.queue.view])
    logits = views[0].combined(outputs)
    if len(views) == 1:
        return logits
    number = torch.from_numpy(query.batch.host["job"] // query.queue.attempts(instrumented)).to(index.device)[
        index
    ]
    for part, view in enumerate(views[1:], 1):
        logits = torch.where((number == part)[:, None], view.combined(outputs), logits)
    return logits


def _merged(parts: list[tuple[Tensor, Answer, Logits]]) -> tuple[Answer, Logits]:
    """Return the answers to all rows in order, and the model's own logits."""
    if len(parts) == 1:
        return parts[0][1:]
    order = torch.cat([index for index, *_ in parts]).argsort()
    own = torch.cat([logits for *_, logits in parts])[order]
    return merge_answers([(index, answer) for index, answer, _ in parts]), own


def _cut(rows: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    return tuple(torch.split(rows, sizes))
