"""What a step finds out about each row: its best point by the model's own logits, and its claim."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from robustkit.core import criteria
from robustkit.core.devices import ComputeDevice
from robustkit.core.threat import ThreatModel, per_row
from robustkit.engine.batching.forward_passes import Result, cut, joined
from robustkit.engine.batching.row_batch import RowBatch

# The columns that a step reads or changes for the rows of all attacks at once.
SHARED = ("labels", "best", "nearest", "broken", "refused", "claim", "claim_logits", "when")


class StepResults:
    """Notes the results of steps for all attacks together, in columns that are joined once and kept joined."""

    def __init__(self, threat: ThreatModel) -> None:
        """Nothing is joined yet."""
        self.threat = threat
        self._batches: Sequence[RowBatch] = ()
        self._columns: dict[str, Tensor] = {}

    def columns(self, batches: Sequence[RowBatch]) -> dict[str, Tensor]:
        """Return the shared columns of these batches, joined; the batches' own are parts of the same memory."""
        known = len(batches) == len(self._batches) and all(map(_same, batches, self._batches))
        if not known:
            self._columns = {name: joined([batch.device[name] for batch in batches]) for name in SHARED}
            self.keep(batches, self._columns)
        return self._columns

    def keep(self, batches: Sequence[RowBatch], columns: dict[str, Tensor]) -> None:
        """Make the columns' parts those of the batches."""
        sizes = [len(batch) for batch in batches]
        for name, column in columns.items():
            for batch, part in zip(batches, cut(column, sizes), strict=True):
                batch.device[name] = part
        self._batches, self._columns = batches, columns

    def noted(self, results: Sequence[Result], number: int, rounding: float) -> dict[str, Tensor]:
        """Return the shared columns after a step; those before it are not changed.

        Args:
            results: of all attacks with rows.
            number: of the step since results were read from the device, from 0.
            rounding: a bound on the rounding error of the logits, as a share of the largest one.
        """
        columns = self.columns([result.query.batch for result in results])
        labels, logits = columns["labels"], joined([result.logits for result in results])
        points = joined([result.query.state["x"] for result in results])
        device = ComputeDevice(points.device)
        margin = self._margins(results, criteria.margin(logits, labels).double())
        exact = np.concatenate([result.query.exact for result in results])
        in_float32 = device.upload(torch.from_numpy(exact)) if exact.any() else None
        largest = logits.abs().amax(1)
        seems = logits.argmax(1) != labels
        if rounding:
            # A search in low precision may not see that a point fools the float32 model.
            tolerance = rounding * largest.double()
            tolerance = tolerance if in_float32 is None else torch.where(in_float32, 0, tolerance)
            seems = seems | (margin > -tolerance)
        claims = seems & (margin > columns["refused"]) & (columns["when"] < 0)
        ended = np.concatenate([result.query.batch.host["ended"] for result in results])
        if ended.any():
            claims = claims & device.upload(torch.from_numpy(~ended))
        nearer = margin > columns["nearest"]
        known = torch.nan if in_float32 is None else torch.where(in_float32[:, None], logits, torch.nan)
        return {
            **columns,
            "best": torch.where(per_row(nearer, points), points, columns["best"]),
            "nearest": torch.where(nearer, margin, columns["nearest"]),
            "broken": columns["broken"] | ~(largest < torch.inf),
            "claim": torch.where(per_row(claims, points), points, columns["claim"]),
            "claim_logits": torch.where(claims[:, None], known, columns["claim_logits"]),
            "when": columns["when"].masked_fill(claims, number),
        }

    def _margins(self, results: Sequence[Result], margin: Tensor) -> Tensor:
        """Return the margins (B) with minus infinity at points outside the threat."""
        if not any(result.query.queue.options.queries_outside_ball for result in results):
            return margin
        parts = []
        for result, part in zip(results, cut(margin, [len(result.logits) for result in results]), strict=True):
            query = result.query
            if query.queue.options.queries_outside_ball:
                inside = self.threat.contains(query.state["x"], query.batch.device["x"])
                part = torch.where(inside, part, -torch.inf)
            parts.append(part)
        return joined(parts)


def _same(first: RowBatch, second: RowBatch) -> bool:
    return first is second
