"""HopSkipJump (Chen, Jordan & Wainwright 2020, arXiv:1904.02144) in l2: a boundary walk by predicted labels.

From a misclassified random image the search goes back to the boundary by bisection. There the direction of the
normal is estimated from the labels of nearby points; a step along it, halved until it is misclassified, and
another bisection lead to a nearer point of the boundary.

Departures from the authors' code: every query, of whatever part, is one step, so that images at different parts
share each pass; the random start is bisected once, at the final tolerance, where theirs is bisected twice; a start
is drawn until one is misclassified, where theirs gives up after 10,000.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from robustkit.attack_api import Answer, Rows, State
from robustkit.attacks.score.labels_only import LabelsOnly
from robustkit.core.limits import Limits
from robustkit.core.shapes import Images, PerRow
from robustkit.core.threat import per_row
from robustkit.registry import attack
from robustkit.registry.ranges import Count

# The parts of the search that a row can be at.
START, BISECTION, ESTIMATE, STEP = range(4)
# The distance of the nearby points at the first boundary point, and the most of them.
FIRST_DISTANCE, MAX_SAMPLES = 0.1, 10_000


@attack("hop-skip-jump", paper="arXiv:1904.02144", norms=("l2",), access="decision")
@dataclass(frozen=True, slots=True)
class HopSkipJump(LabelsOnly):
    """Walk along the boundary by labels alone; the normal is estimated from more and more nearby points.

    `queries` is the most queries of an image; `samples` is how many nearby points the first estimate takes, which
    grows with the square root of the number of steps.
    """

    queries: Annotated[int, Limits(1, 100_000_000)] = 1000
    samples: Count = 100

    def init(self, rows: Rows) -> State:
        """Return a random image as the first query."""
        start = rows.rng.uniform(*rows.x.shape[1:]).to(rows.x.dtype)
        zero = torch.zeros(len(start), dtype=torch.float64, device=start.device)
        none = torch.zeros_like(rows.x)
        return {
            "x": start,
            "part": torch.full_like(zero, START, dtype=torch.int64),
            "far": start,
            "low": zero,
            "high": torch.ones_like(zero),
            "boundary": rows.x,
            "round": torch.zeros_like(zero, dtype=torch.int64),
            "drawn": torch.zeros_like(zero, dtype=torch.int64),
            "signed": none,
            "plain": none,
            "signs": zero,
            "normal": none,
            "length": zero,
        }

    def step(self, rows: Rows, state: State, answer: Answer) -> State:
        """Use the label of the query, and propose the next query of the part that each row is at."""
        state, fooled, part = dict(state), answer.loss > 0.5, state["part"]
        found = fooled & ((part == START) | (part == STEP))
        state["far"] = _where(found, state["x"], state["far"])
        bisected = part == BISECTION
        middle = (state["low"] + state["high"]) / 2
        state["high"] = torch.where(bisected & fooled, middle, torch.where(found, 1.0, state["high"]))
        state["low"] = torch.where(bisected & ~fooled, middle, torch.where(found, 0.0, state["low"]))
        at_boundary = bisected & (state["high"] - state["low"] <= _threshold(rows.x))
        state["boundary"] = _where(at_boundary, _blend(rows, state, state["high"]), state["boundary"])
        state["round"] = state["round"] + at_boundary
        self._count(rows, state, fooled, part == ESTIMATE, at_boundary)
        estimated = (part == ESTIMATE) & (state["drawn"] >= self._wanted(state["round"]))
        state["normal"] = _where(estimated, _normal(state), state["normal"])
        distance = rows.threat.distance(state["boundary"], rows.x).double()
        longest = distance / state["round"].clamp(min=1).sqrt()
        state["length"] = torch.where(estimated, longest, torch.where(part == STEP, state["length"] / 2, longest))
        part = torch.where(found, BISECTION, part)
        part = torch.where(at_boundary, ESTIMATE, part)
        state["part"] = torch.where(estimated, STEP, part)
        state["x"] = self._query(rows, state)
        return state

    def _wanted(self, number: Tensor) -> Tensor:
        """Return how many nearby points the estimate of each row's round takes (B)."""
        return (self.samples * number.clamp(min=1).double().sqrt()).long().clamp(max=MAX_SAMPLES)

    def _count(self, rows: Rows, state: State, fooled: Tensor, sampled: Tensor, fresh: Tensor) -> None:
        """Add the label of a nearby point to the sums of its row, which are 0 at a new boundary point."""
        sign = torch.where(fooled, 1.0, -1.0).double()
        offset = (state["x"] - state["boundary"]) / per_row(_nearness(rows, state), rows.x).to(rows.x.dtype)
        offset = _where(sampled, offset, torch.zeros_like(offset))
        sign = torch.where(sampled, sign, 0.0)
        keep = ~fresh
        state["drawn"] = (state["drawn"] + sampled) * keep
        state["signs"] = (state["signs"] + sign) * keep
        state["plain"] = (state["plain"] + offset) * per_row(keep, rows.x)
        state["signed"] = (state["signed"] + offset * per_row(sign, rows.x).to(offset.dtype)) * per_row(
            keep, rows.x
        )

    def _query(self, rows: Rows, state: State) -> Images:
        """Return the next query of each row."""
        part = state["part"]
        start = rows.rng.uniform(*rows.x.shape[1:]).to(rows.x.dtype)
        noise = rows.rng.normal(*rows.x.shape[1:]).to(rows.x.dtype)
        noise = noise / per_row(noise.flatten(1).norm(dim=1), noise)
        near = state["boundary"] + per_row(_nearness(rows, state), noise).to(noise.dtype) * noise
        step = state["boundary"] + per_row(state["length"], noise).to(noise.dtype) * state["normal"]
        x = _where(part == BISECTION, _blend(rows, state, (state["low"] + state["high"]) / 2), start)
        x = _where(part == ESTIMATE, near, x)
        return _where(part == STEP, step, x).clamp(0, 1)


def _threshold(x: Images) -> float:
    """Return the width of a bisection, as a share of the segment, at which it ends."""
    return float(x[0].numel() ** -1.5)


def _nearness(rows: Rows, state: State) -> PerRow:
    """Return how far nearby points are from the boundary point (B)."""
    later = (
        rows.x[0].numel() ** 0.5 * _threshold(rows.x) * rows.threat.distance(state["boundary"], rows.x).double()
    )
    return torch.where(state["round"] <= 1, FIRST_DISTANCE, later).clamp(min=1e-9)


def _normal(state: State) -> Images:
    """Return the estimate of the normal, of length 1, from the sums over nearby points."""
    drawn = state["drawn"].clamp(min=1).double()
    mean = state["signs"] / drawn
    same = mean.abs() == 1
    weight = per_row(torch.where(same, 0.0, mean), state["plain"]).to(state["plain"].dtype)
    direction = state["signed"] - weight * state["plain"]
    length = direction.flatten(1).norm(dim=1).clamp(min=1e-12)
    return direction / per_row(length, direction)


def _blend(rows: Rows, state: State, share: PerRow) -> Images:
    """Return the points at this share (B) of the way from the clean images to the misclassified ones."""
    return rows.x + per_row(share, rows.x).to(rows.x.dtype) * (state["far"] - rows.x)


def _where(mask: Tensor, yes: Images, no: Images) -> Images:
    return torch.where(per_row(mask, yes), yes, no)
