"""Robust accuracy against eps: how near the nearest fooling image is, by a search that reuses what it finds.

Each image has a bracket of radii on a grid of eighths of eps: the largest that it withstood, and the smallest
within which a verified fooling image lies. The radius halfway is tried next, first by projecting the known
fooling image onto that ball, then by a short attack; so one attack settles all radii on one side of it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from robustkit import registry
from robustkit.data.samples import Samples
from robustkit.engine.judge import judge
from robustkit.engine.meter import Meter
from robustkit.engine.progress import Progress
from robustkit.engine.worker import NO_MEMORY
from robustkit.errors import RunError, UsageError
from robustkit.goal import Goal
from robustkit.isolation import evaluation_mode, own_randomness, threads
from robustkit.record import Cost, Curve, Flag, Report
from robustkit.rng import RowRng
from robustkit.shapes import Images, Labels, Mask
from robustkit.threat import ThreatModel, per_row

PARTS, WIDEST = 8, 16
BATCH_SIZE = 256
HALVINGS = 8


def radii(threat: ThreatModel, shape: tuple[int, ...]) -> list[ThreatModel]:
    """Return the grid: every eighth of eps up to twice eps, as far as images of this shape (C H W) reach.

    Raises:
        UsageError: if eps is 0, which has no eighths.
    """
    if not threat.eps:
        raise UsageError(f"threat '{threat}' has no curve; write an eps above 0, e.g. {threat.norm}:8/255.")
    grid = [type(threat)(threat.eps * k / PARTS) for k in range(1, WIDEST + 1)]
    return [part for part in grid if float(part.eps) <= threat.diameter(shape)]


def add_curve(
    report: Report,
    adversarial: dict[str, np.ndarray],
    meter: Meter,
    samples: Samples,
    threat: ThreatModel,
    progress: Progress,
) -> Report:
    """Return the report of a finished run with its curve.

    Args:
        report: of the run.
        adversarial: its verified fooling images: `index` (M), `x` (M C H W).
        meter: the model, new, so that it counts the curve's cost alone.
        samples: those of the run.
        threat: the run's.
        progress: who to tell on the way.

    Raises:
        UsageError: if eps is 0.
        RunError: when out of memory.
    """
    begun = time.perf_counter()
    image = samples.images([0])
    grid = radii(threat, tuple(image.shape[1:]))
    right = np.array([v.index for v in report.verdicts if v.attack != "clean"], np.int64)
    robust = np.array([verdict.robust for verdict in report.verdicts])
    known = {int(at): row for row, at in enumerate(adversarial["index"])}
    found = np.zeros(report.n)
    within = 0
    standing = int(robust.sum())
    progress.stage("curve", len(right), standing, report.n)
    with evaluation_mode(meter.model), own_randomness(report.spec.seed, "curve"):
        meter.size_up(image.to(meter.device), BATCH_SIZE)
        with threads(meter.threads):
            for begin in range(0, len(right), BATCH_SIZE):
                part = right[begin : begin + BATCH_SIZE]
                x = samples.images(part)
                x_adv = x.clone()
                fooled = np.flatnonzero(~robust[part])
                x_adv[fooled] = torch.from_numpy(adversarial["x"][[known[int(at)] for at in part[fooled]]])
                search = Search(
                    meter, threat, grid, report.spec.seed, part, x, samples.labels[part], x_adv, robust[part]
                )
                found[part], inside = search.run(progress)
                within += inside
                progress.advance(begin + len(part), standing)
    distances = [float(d) if np.isfinite(d) else None for d in found]
    cost = Cost(meter.forwards, meter.backwards, time.perf_counter() - begun)
    curve = Curve.of([float(part.eps) for part in grid], distances, cost)
    return report.with_curve(curve, [_beaten(within)] if within else [])
