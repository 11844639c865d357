"""The card: a PNG of 1200 x 630 pixels with robust accuracy, interval and cascade, for slides and READMEs."""

from __future__ import annotations

import io
import textwrap
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from robustkit.reporting import sentences
from robustkit.reporting.charts.cascade import shortened
from robustkit.reporting.names import stage_names
from robustkit.reporting.terminal.evaluation import interval, percent
from robustkit.runs.evaluation_record import Report

INK, SOFT, RULE = "#1a1d23", "#59616e", "#d9dde4"
ROBUST, FOOLED, FOOLED_GROUND = "#2a6ea6", "#c2501b", "#fbe4d6"
MARGIN_LEFT, MAX_STAGES = 0.045, 8
BOLD: dict[str, Any] = {"weight": "bold", "color": INK, "parse_math": False}
SOFT_TEXT: dict[str, Any] = {"color": SOFT, "parse_math": False}


def card(report: Report) -> bytes:
    """Return the card as the bytes of a PNG; the same report gives the same bytes."""
    figure = Figure(figsize=(12, 6.3), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    name = shortened(sentences.model_name(report), 100)
    title = textwrap.wrap(name, 50, break_on_hyphens=False)
    size = 26 if len(title) == 1 else 21
    heading = figure.text(MARGIN_LEFT, 0.93, "\n".join(title), size=size, va="top", **BOLD)
    width = heading.get_window_extent().width / figure.bbox.width
    heading.set_fontsize(size * min(1.0, (1 - 2 * MARGIN_LEFT) / width))
    figure.text(MARGIN_LEFT, 0.615, percent(report.robust_accuracy.value), size=68, va="center", **BOLD)
    beside = [
        "robust accuracy",
        sentences.interval(report.robust_accuracy.low, report.robust_accuracy.high),
        f"clean accuracy {percent(report.clean_accuracy.value)}",
        f"{report.spec.threat}, {sentences.images(report)}",
        shortened(sentences.data_name(report), 36),
    ]
    for row, line in enumerate(beside):
        figure.text(MARGIN_LEFT, 0.46 - 0.058 * row, line, size=16, **SOFT_TEXT)
    _cascade(report, figure)
    below = f"robustkit   run {report.run_id}   {sentences.trust(report)}"
    figure.text(MARGIN_LEFT, 0.03, below, size=13, **SOFT_TEXT)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _cascade(report: Report, figure: Figure) -> None:
    """Draw the robust accuracy after each stage; of many stages the first and the last ones."""
    stages, names = list(report.stages), stage_names(report)
    before = [1.0, *(stage.robust_accuracy.value for stage in stages)]
    shown = list(range(len(stages)))
    if len(stages) > MAX_STAGES:
        shown = [0, *range(len(stages) - MAX_STAGES + 1, len(stages))]
    height = min(0.65, 0.125 * max(len(shown), 2))
    axes = figure.add_axes((0.47, 0.465 - height / 2, 0.485, height))
    for row, number in enumerate(shown):
        rate = stages[number].robust_accuracy
        axes.barh(row, 100 * rate.value, height=0.4, color=ROBUST)
        lost = 100 * (before[number] - rate.value)
        if lost > 0:
            style: dict[str, Any] = {"color": FOOLED_GROUND, "edgecolor": FOOLED, "hatch": "////"}
            if number == 0:  # misclassified without an attack
                style = {"color": RULE, "edgecolor": SOFT, "hatch": "...."}
            axes.barh(row, lost, left=100 * rate.value, height=0.4, **style)
        ends = [[100 * (rate.value - rate.low)], [100 * (rate.high - rate.value)]]
        axes.errorbar([100 * rate.value], [row], xerr=ends, color=INK, capsize=4, linewidth=1.6)
        name = "clean images" if number == 0 else f"after {shortened(names[number], 24)}"
        axes.text(0, row - 0.24, name, size=13, va="bottom", **BOLD)
        result = f"{percent(rate.value)}  ({interval(rate)})"
        axes.text(100, row - 0.24, result, size=13, va="bottom", ha="right", **SOFT_TEXT)
    axes.set_xlim(0, 100)
    axes.set_ylim(len(shown) - 0.6, -0.7)
    axes.set_yticks([])
    axes.set_xticks([0, 25, 50, 75, 100], ["0 %", "25 %", "50 %", "75 %", "100 %"], color=SOFT, size=12)
    axes.tick_params(length=0)
    axes.grid(axis="x", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    hidden = len(stages) - len(shown)
    about = f"; {hidden} earlier attack{'s' * (hidden > 1)} not drawn" if hidden else ""
    signs = "hatched: fooled; dotted: clean errors; 95 % intervals"
    axes.set_xlabel(f"{signs}{about}", size=11, color=SOFT)
