"""A chart of robust accuracy against eps, from a curve at fixed radii."""

from __future__ import annotations

from itertools import pairwise

from markupsafe import Markup

from robustkit.reporting import sentences
from robustkit.reporting.charts import svg
from robustkit.reporting.terminal.evaluation import percent
from robustkit.runs.evaluation_record import Report
from robustkit.runs.report_parts import Curve

HEIGHT, TOP = 190.0, 34.0
FLOOR = TOP + HEIGHT


def chart(report: Report, curve: Curve) -> Markup:
    """Return the chart: robust accuracy with its 95 % band from eps 0, the clean accuracy; eps is marked."""
    widest = curve.radii[-1]
    rates = [report.clean_accuracy, *curve.robust_accuracy]
    across = [radius / widest for radius in (0.0, *curve.radii)]
    points = list(zip(across, [_down(rate.value) for rate in rates], strict=True))
    high = zip(across, [_down(rate.high) for rate in rates], strict=True)
    low = zip(across, [_down(rate.low) for rate in rates], strict=True)
    parts = svg.shares_against(widest, FLOOR, HEIGHT, f"eps: {sentences.distance_unit(report)}")
    parts.append(svg.area(high, low, "band"))
    parts += [svg.line(*left, *right, "curve") for left, right in pairwise(points)]
    parts += [svg.dot(*point, "robust") for point in points]
    x, name = sentences.eps(report) / widest, f"eps {report.spec.threat.partition(':')[2]}"
    parts += [svg.line(0, FLOOR, 1, FLOOR, "axis"), svg.line(x, TOP - 12, x, FLOOR, "mark")]
    parts.append(svg.text(x, TOP - 16, name, anchor="end" if x > 0.8 else "middle", kind="name"))
    spoken = "; ".join(
        f"{radius:.4g} {percent(rate.value)}"
        for radius, rate in zip(curve.radii, curve.robust_accuracy, strict=True)
    )
    return svg.drawing(parts, FLOOR + 38, f"Robust accuracy against eps: {spoken}")


def _down(share: float) -> float:
    return FLOOR - share * HEIGHT
