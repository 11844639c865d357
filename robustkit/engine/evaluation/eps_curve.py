"""Robust accuracy as a function of eps: the distance of each image's nearest fooling image, by bisection.

Each image has a bracket on a grid of eighths of eps: the largest radius at which it was robust, and the smallest
one with a verified fooling image. The radius halfway is tried next: the known fooling image projected onto that
ball, and only if that fails a short attack. The result settles every radius on one side of it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustkit import registry
from robustkit.attack_api import RowWise
from robustkit.core.criteria import Goal
from robustkit.core.errors import RunError
from robustkit.core.flags import Flag
from robustkit.core.isolation import evaluation_mode, own_randomness, threads
from robustkit.core.out_of_memory import retry_in_memory
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images, Labels, PerRow
from robustkit.core.threat import ThreatModel, per_row
from robustkit.data.samples import Samples
from robustkit.engine.evaluation.verdicts import Verdicts, image_hashes, judge, sample_ids
from robustkit.engine.model.instrumented_model import InstrumentedModel, halve_micro_batch
from robustkit.engine.model.profiling import measure
from robustkit.engine.progress import Progress
from robustkit.models.failures import described
from robustkit.runs.evaluation_record import Report
from robustkit.runs.recorded_outputs import run_once
from robustkit.runs.report_parts import Cost, Curve

# Grid points per eps, and grid points in all.
GRID_PER_EPS, GRID_POINTS = 8, 16
BATCH_SIZE = 256
HALVINGS = 8
# The attack that decides a radius, and one whose path from the clean image is nearly straight, so that it crosses
# the decision boundary near its nearest point.
ATTACK = registry.make("apgd-t", steps=20, targets=3)
STRAIGHT = registry.make("pgd", steps=20, step_size="0.1eps", loss="margin", random_start=False)


def radii(threat: ThreatModel, shape: tuple[int, ...]) -> list[ThreatModel]:
    """Return the grid: every eighth of eps up to twice eps, no more than the largest distance of images."""
    grid = [threat.eps * k / GRID_PER_EPS for k in range(1, GRID_POINTS + 1)]
    return [type(threat)(eps) for eps in grid if float(eps) <= threat.diameter(shape)]


@dataclass(frozen=True)
class CurveSearch:
    """The search over a finished run's images; `instrumented` counts this search alone."""

    instrumented: InstrumentedModel
    samples: Samples
    threat: ThreatModel
    progress: Progress

    def add(self, report: Report, index: np.ndarray, adversarial: np.ndarray) -> Report:
        """Return the report with its curve, from the run's fooling images `adversarial` (M C H W) at `index` (M).

        Raises:
            RunError: when out of memory even with one image at a time.
        """
        begun = time.perf_counter()
        image = self.samples.images([0])
        grid = radii(self.threat, tuple(image.shape[1:]))
        right = np.array([verdict.index for verdict in report.verdicts if verdict.attack != "clean"], np.int64)
        robust = sum(verdict.robust for verdict in report.verdicts)
        distance, inside, forwards, backwards = np.zeros(report.n), 0, 0, 0
        self.progress.stage("curve", len(right), robust, report.n)
        with evaluation_mode(self.instrumented.model), own_randomness(report.spec.seed, "curve"):
            measure(self.instrumented, image.to(self.instrumented.device), BATCH_SIZE)
            with threads(self.instrumented.threads):
                for begin in range(0, len(right), BATCH_SIZE):
                    part = right[begin : begin + BATCH_SIZE]
                    known = adversarial[np.isin(index, part)]
                    result = run_once(
                        f"from {begin}",
                        partial(self._batch, part, np.isin(part, index), known, grid, report.spec.seed),
                    )
                    distance[part] = result["distance"].numpy()
                    inside += int(result["inside"].sum())
                    forwards, backwards = forwards + result["forwards"], backwards + result["backwards"]
                    self.progress.advance(begin + len(part), robust)
        curve = Curve.of(
            [float(entry.eps) for entry in grid],
            [value if np.isfinite(value) else None for value in distance.tolist()],
            Cost(forwards, backwards, time.perf_counter() - begun),
        )
        return report.with_curve(curve, [_too_weak(inside)] if inside else [])

    def _batch(
        self, positions: np.ndarray, fooled: np.ndarray, known: np.ndarray, grid: list[ThreatModel], seed: int
    ) -> dict[str, Any]:
        """Search for these positions; return distances, images fooled inside eps after all, and passes.

        Out of memory halves the micro-batch and starts the batch again.
        """
        device = self.instrumented.device
        x, hit = self.samples.images(positions).to(device), torch.from_numpy(fooled).to(device)
        x_adv = x.clone()
        x_adv[hit] = torch.from_numpy(known).to(device)
        ids = sample_ids(image_hashes(x)).to(device)
        labels = torch.from_numpy(self.samples.labels[positions]).to(device)
        instrumented = self.instrumented
        before = instrumented.forwards, instrumented.backwards

        def work() -> dict[str, Any]:
            instrumented.forwards, instrumented.backwards = before
            with instrumented.using(instrumented.config):
                brackets = Brackets(instrumented, grid, seed, ids, x, labels, x_adv.clone(), hit)
                brackets.close()
                brackets.tighten()
            spent = {
                "forwards": instrumented.forwards - before[0],
                "backwards": instrumented.backwards - before[1],
            }
            return {"distance": brackets.distance.cpu(), "inside": brackets.inside.cpu(), **spent}

        def reduce() -> None:
            size = halve_micro_batch(instrumented, len(x))
            self.progress.say(f"out of memory: going on with {size} images at a time, same numbers")

        try:
            return retry_in_memory(work, reduce, device)
        except RuntimeError as error:
            raise RunError(f"the curve failed with {described(error)}.") from error


class Brackets:
    """The brackets of one batch, on the grid's radii with 0 before them.

    `distance` (B) is that of the nearest verified fooling image so far, `x_adv` that image, `low` the number of
    the largest radius at which the image was robust. An image that the suite left robust starts at eps: a fooling
    image found inside eps after all counts as just outside, and `inside` (B) marks it.
    """

    def __init__(
        self,
        instrumented: InstrumentedModel,
        grid: list[ThreatModel],
        seed: int,
        ids: Tensor,
        x: Images,
        labels: Labels,
        x_adv: Images,
        fooled: Tensor,
    ) -> None:
        self.instrumented, self.grid, self.seed = instrumented, grid, seed
        self.ids, self.x, self.labels, self.x_adv = ids, x, labels, x_adv
        entries = [0.0, *(float(entry.eps) for entry in grid)]
        self.radii = torch.tensor(entries, dtype=torch.float64, device=x.device)
        self.base = torch.where(fooled, 0, GRID_PER_EPS)
        self.low = self.base
        self.distance = torch.where(fooled, grid[-1].distance(x_adv, x), torch.inf)
        self.inside = torch.zeros_like(fooled)

    def close(self) -> None:
        """Try radii until no bracket has a grid point inside."""
        while True:
            high = torch.searchsorted(self.radii, self.distance)
            middle = torch.where(high - self.low > 1, (self.low + high) // 2, 0)
            if not middle.any():
                return
            for entry in sorted(set(middle.tolist()) - {0}):
                self._try(entry, (middle == entry).nonzero()[:, 0])

    def tighten(self) -> None:
        """Bisect the segments to the known fooling image and to that of the straight attack."""
        rows = self.distance.isfinite().nonzero()[:, 0]
        self._back(rows, self.x_adv[rows])
        # The known fooling image may be far from the nearest one.
        high = torch.searchsorted(self.radii, self.distance[rows])
        for entry in sorted(set(high.tolist())):
            group = rows[high == entry]
            judged = self._attack(STRAIGHT, entry, group)
            self._back(group[judged.fooled], judged.x[judged.fooled])

    def _back(self, rows: Tensor, points: Images) -> None:
        """Bisect the segments from the clean images of these rows to fooling points."""
        if not len(rows):
            return
        x, length = self.x[rows], self.grid[-1].distance(points, self.x[rows])
        low, high = self.radii[self.low[rows]], length
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            share = (middle / length).clamp(max=1).to(x)
            judged = judge(
                self.instrumented, x, self.labels[rows], x + per_row(share, x) * (points - x), self.grid[-1]
            )
            self._take(rows, judged)
            low, high = torch.where(judged.fooled, low, middle), torch.where(judged.fooled, middle, high)

    def _try(self, entry: int, rows: Tensor) -> None:
        """Search for fooling images of these rows within the radius of a grid point."""
        threat = self.grid[entry - 1]
        near = rows[self.distance[rows].isfinite()]
        if len(near):
            point = threat.project(self.x_adv[near], self.x[near])
            self._take(near, judge(self.instrumented, self.x[near], self.labels[near], point, threat))
        rows = rows[self.distance[rows] > self.radii[entry]]
        if not len(rows):
            return
        robust = rows[~self._attack(ATTACK, entry, rows).fooled]
        self.low = self.low.index_fill(0, robust, entry)

    def _attack(self, attack: RowWise, entry: int, rows: Tensor) -> Verdicts:
        """Attack these rows within the radius of a grid point."""
        x, labels, threat = self.x[rows], self.labels[rows], self.grid[entry - 1]
        rng = RowRng(self.seed, f"curve/{entry}", self.ids[rows])
        result = attack(self.instrumented, x, Goal(labels), threat, rng=rng)
        judged = judge(self.instrumented, x, labels, result, threat)
        self._take(rows, judged)
        return judged

    def _take(self, rows: Tensor, judged: Verdicts) -> None:
        """Keep the points of these rows that fool the model at a smaller distance than before."""
        distance: PerRow = self.grid[-1].distance(judged.x, self.x[rows])
        closer = judged.fooled & (distance < self.distance[rows])
        rows, distance = rows[closer], distance[closer]
        floor = self.radii[self.base[rows]]
        self.inside = self.inside.index_fill(0, rows[(distance <= floor) & (self.base[rows] > 0)], True)
        self.x_adv = self.x_adv.index_copy(0, rows, judged.x[closer])
        self.distance = self.distance.index_copy(0, rows, distance.maximum(floor.nextafter(floor + 1)))
        # A fooling image inside a radius taken for robust reopens the bracket.
        disproved = rows[self.distance[rows] <= self.radii[self.low[rows]]]
        self.low = self.low.index_copy(0, disproved, self.base[disproved])


def _too_weak(images: int) -> Flag:
    return Flag(
        "suite-too-weak",
        "warning",
        images,
        "images that were robust to the suite were fooled within eps by the curve's search; they count as robust",
        "run a stronger suite, such as rapid",
    )
