"""The cascade: a chart of the robust accuracy after each attack."""

from __future__ import annotations

from markupsafe import Markup

from robustkit.reporting.charts import svg
from robustkit.reporting.names import stage_names
from robustkit.reporting.terminal.evaluation import interval, percent
from robustkit.runs.evaluation_record import Report

ROW_HEIGHT = 50


def cascade(report: Report) -> Markup:
    """Return the chart: per stage the robust share, the share fooled in the stage, and the 95 % interval."""
    parts, before = [], 1.0
    height = ROW_HEIGHT * len(report.stages)
    for share in (0, 0.25, 0.5, 0.75, 1):
        anchor = "start" if share == 0 else "end" if share == 1 else "middle"
        parts.append(svg.line(share, 0, share, height, "grid"))
        parts.append(svg.text(share, height + 14, f"{100 * share:.0f} %", anchor=anchor, kind="tick"))
    names = stage_names(report)
    for number, stage in enumerate(report.stages):
        top, rate = ROW_HEIGHT * number, stage.robust_accuracy
        name = "clean images" if number == 0 else f"after {shortened(names[number], 26)}"
        parts.append(svg.text(0, top + 15, name, kind="name"))
        parts.append(svg.text(1, top + 15, f"{percent(rate.value)}  ({interval(rate)})", anchor="end"))
        if rate.value > 0:
            parts.append(svg.bar(0, top + 22, rate.value, 16, "robust"))
        if before > rate.value:
            kind = "fooled" if number else "clean"  # the first row is the clean stage
            parts.append(svg.bar(rate.value, top + 22, before - rate.value, 16, kind))
        parts.append(svg.whisker(rate.low, rate.high, top + 30))
        before = rate.value
    spoken = "; ".join(
        f"{name} {percent(stage.robust_accuracy.value)}" for name, stage in zip(names, report.stages, strict=True)
    )
    return svg.drawing(parts, height + 18, f"Robust accuracy after each attack: {spoken}")


def shortened(text: str, width: int) -> str:
    """Return the text, with an ellipsis in its middle if it is longer than `width`."""
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"
