"""Judges claims: points that fool the model during the search. Random models are judged by fresh draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from robustkit.core import criteria
from robustkit.core.out_of_memory import retry_in_memory
from robustkit.core.shapes import Images, Labels, PerRow
from robustkit.core.threat import ThreatModel, per_row
from robustkit.engine.batching.attack_queue import AttackQueue
from robustkit.engine.batching.forward_passes import joined
from robustkit.engine.batching.row_batch import RowBatch
from robustkit.engine.evaluation.verdicts import Verdicts, judge
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.engine.model.random_refinement import STEPS, choose_eot_view, refine_with_eot
from robustkit.gradient_views.view_kinds import MEAN_DRAWS

T = TypeVar("T")

# Draws by which the nearest point of one attack is compared with that of the next, where a model is random.
COMPARISON_DRAWS = 16


@dataclass(frozen=True)
class ClaimJudge:
    """Judges the claims of a continuous batch on the model itself, in float32.

    Attributes:
        instrumented: the model.
        threat: the perturbations that are allowed.
        recover: called after a try that ran out of memory; it makes another try possible, or raises RunError.
    """

    instrumented: InstrumentedModel
    threat: ThreatModel
    recover: Callable[[], None]

    def retry(self, work: Callable[[], T]) -> T:
        """Return what `work` returns; it is run again after a recovery, so it changes nothing itself."""
        return retry_in_memory(work, self.recover, self.instrumented.device)

    def judge_claims(self, batches: Sequence[RowBatch]) -> tuple[Verdicts, np.ndarray, np.ndarray]:
        """Return the verdicts on the claims of several queues, by one pass, with `fooled` and `forwards` read."""
        names = ("x", "labels", "claim", "claim_logits")
        x, labels, claim, known = (joined([batch.device[name] for batch in batches]) for name in names)
        judged = self.retry(lambda: judge(self.instrumented, x, labels, claim, self.threat, known))
        fooled, forwards = torch.stack([judged.fooled.to(judged.forwards.dtype), judged.forwards]).cpu().numpy()
        return judged, fooled > 0, forwards

    def judge_best(self, batch: RowBatch) -> Verdicts:
        """Return the verdicts on the rows' best points, and charge them to their last attack."""
        part = batch.device
        judged = self.retry(lambda: judge(self.instrumented, part["x"], part["labels"], part["best"], self.threat))
        batch.charge_last_attack(np.arange(len(batch)), judged.forwards.cpu().numpy())
        return judged

    def compare_nearest(self, batch: RowBatch) -> None:
        """For random models: choose between the last attack's best point and that before by fresh draws.

        The margins that the attacks recorded are the highest of many draws.
        """
        if not self.instrumented.random:
            return
        part = batch.device
        moved = (part["best"] != part["anchor"]).flatten(1).any(1).nonzero()[:, 0]
        if not len(moved):
            return
        points = torch.stack([part["anchor"][moved], part["best"][moved]])
        margins = self._mean_margin(points.flatten(0, 1), part["labels"][moved].repeat(2)).view(2, -1)
        margin, better = margins.max(0)
        nearest = torch.where(per_row(better > 0, points[1]), points[1], points[0])
        part["best"] = part["best"].index_copy(0, moved, nearest)
        part["anchor"], part["nearest"] = part["best"], part["nearest"].index_copy(0, moved, margin)
        part["refused"] = torch.minimum(part["refused"], part["nearest"])
        batch.charge_last_attack(moved.cpu().numpy(), 2 * COMPARISON_DRAWS)

    def refine(self, queue: AttackQueue, fooled: RowBatch, judged: Verdicts) -> Verdicts:
        """For random models: refine points that some draws classify correctly by EOT gradient steps.

        Returns:
            The verdicts, with those of the refined points where they are better.
        """
        view = choose_eot_view(queue.view, self.instrumented.views)
        usable = queue.options.needs_gradient and (view or self.instrumented.differentiable)
        if not (self.instrumented.random and usable):
            return judged
        open_rows = (judged.right > 0).nonzero()[:, 0]
        if not len(open_rows):
            return judged
        passes = self.instrumented.passes(view)[0] if view else MEAN_DRAWS
        x, labels, point = (part[open_rows] for part in (fooled.device["x"], fooled.device["labels"], judged.x))
        model = self.instrumented.view(view) if view else self.instrumented.mean
        refined = self.retry(lambda: refine_with_eot(model, x, labels, point, self.threat))
        better = self._mean_margin(refined, labels) > self._mean_margin(point, labels)
        verdicts = self.retry(lambda: judge(self.instrumented, x, labels, refined, self.threat))
        better = better & verdicts.fooled
        # The host waits for the verdict here anyway.
        index, spent = open_rows.cpu().numpy(), fooled.host["spent"][:, queue.number]
        spent[index] += STEPS * passes
        spent[index, 0] += 2 * COMPARISON_DRAWS + verdicts.forwards.cpu().numpy()
        return judged.replaced(open_rows[better], verdicts.select(better.cpu().numpy()))

    def _mean_margin(self, point: Images, labels: Labels) -> PerRow:
        """Return how far points are beyond the boundary, as the mean over fresh draws."""

        def margin() -> Tensor:
            return criteria.margin(self.instrumented.logits_fp32(point), labels).double()

        mean = torch.stack([self.retry(margin) for _ in range(COMPARISON_DRAWS)]).mean(0)
        return torch.where(mean.isnan(), -torch.inf, mean)
