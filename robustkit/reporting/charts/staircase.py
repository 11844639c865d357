"""A chart of robust accuracy against eps from the distances of minimum norms, which is a staircase."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from robustkit.reporting import quantiles, sentences
from robustkit.reporting.charts import svg
from robustkit.runs.distances import Minimum
from robustkit.runs.evaluation_record import Report

HEIGHT, TOP = 190.0, 12.0
FLOOR = TOP + HEIGHT
# The axis ends at this quantile of the distances, because a few may be much larger.
SHOWN_SHARE = 0.99


def chart(report: Report, minimum: Minimum) -> Markup | None:
    """Return the chart: robust accuracy at each eps; None if no adversarial image was found."""
    steps = list(minimum.curve())
    finite = [distance for distance, _ in steps]
    if not finite or not finite[-1]:
        return None
    widest = finite[math.ceil(SHOWN_SHARE * len(finite)) - 1] or finite[-1]
    parts = svg.shares_against(widest, FLOOR, HEIGHT, f"eps: {sentences.distance_unit(report)}")
    parts += [svg.path(_staircase(steps, widest), "curve"), svg.line(0, FLOOR, 1, FLOOR, "axis")]
    spoken = "; ".join(f"{name} {text}" for name, text in quantiles.columns(minimum))
    return svg.drawing(parts, FLOOR + 38, f"Robust accuracy against eps; quantiles of the distances: {spoken}")


def _staircase(steps: Sequence[tuple[float, float]], widest: float) -> list[tuple[float, float]]:
    """Return the corners of the curve up to the end of the axis."""
    points, before = [(0.0, _down(1.0))], 1.0
    for distance, share in steps:
        if distance > widest:
            break
        points += [(distance / widest, _down(before)), (distance / widest, _down(share))]
        before = share
    return [*points, (1.0, _down(before))]


def _down(share: float) -> float:
    return FLOOR - share * HEIGHT
