"""The page about an evaluation: one self-contained HTML file, made from the record and its example images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from markupsafe import Markup

from robustkit.core.flags import LEVELS
from robustkit.reporting import costs, sentences
from robustkit.reporting.charts import classes, eps_curve, histogram, staircase
from robustkit.reporting.charts.cascade import cascade
from robustkit.reporting.charts.thumbnails import scaled, strip
from robustkit.reporting.html import trust
from robustkit.reporting.html.command import command, commands
from robustkit.reporting.html.render import render
from robustkit.reporting.image_sizes import remarks, size
from robustkit.reporting.names import stage_names
from robustkit.reporting.quantiles import columns, sentence
from robustkit.reporting.terminal.evaluation import interval, median, notes, percent
from robustkit.reporting.versions import made_in_parts
from robustkit.runs.evaluation_record import Report
from robustkit.runs.report_parts import Rate
from robustkit.runs.spec import dumps

MARKS = {"info": "●", "warning": "▲", "error": "✖", "ok": "✓", "not measured": "○"}


def page(report: Report, examples: Mapping[str, np.ndarray] | None) -> str:
    """Return the page; without examples (see `robustkit.runs.examples`) it has no distances and no images."""
    filters: dict[str, Callable[..., str]] = {
        "percent": percent,
        "interval": _interval,
        "ends": interval,
        "short": _short,
        "signed": _signed,
        "sentence": _sentence,
    }
    return render("page.html", _facts_and_charts(report, examples), filters=filters)


def _facts_and_charts(report: Report, examples: Mapping[str, np.ndarray] | None) -> dict[str, Any]:
    names = [] if examples is None else examples["classes"].tolist()
    rows, class_count = classes.rows(report, names)
    margin_chart, beyond = histogram.margins(report)
    eps_text = report.spec.threat.partition(":")[2]
    eps, mark = sentences.eps(report), f"eps {eps_text}"
    if report.minimum:
        eps, mark = report.minimum.median.value or 0.0, "median"
    levels = [flag.level for flag in report.flags]
    return {
        "report": report,
        "model": sentences.model_name(report),
        "data": sentences.data_name(report),
        "images": sentences.images(report),
        "pixels": size(report),
        "remarks": remarks(report),
        "threat": sentences.threat(report),
        "attacks": stage_names(report)[1:],
        "verdict": sentences.verdict(report),
        "trust": sentences.trust(report),
        "worst": max(levels, key=LEVELS.index, default=""),
        "marks": MARKS,
        "flags": trust.flags(report),
        "checks": trust.rows(report),
        "cascade": cascade(report),
        "curve_chart": eps_curve.chart(report, report.curve) if report.curve else None,
        "minimum_chart": staircase.chart(report, report.minimum) if report.minimum else None,
        "quantiles": columns(report.minimum) if report.minimum else [],
        "median_of": sentence(report.minimum) if report.minimum else "",
        "notes": [line.strip() for line in notes(report)],
        "curve_median": median(report.curve) if report.curve else "",
        "classes": rows,
        "class_count": class_count,
        "margin_chart": margin_chart,
        "beyond": beyond,
        "distance_chart": _distances(examples, eps, mark, sentences.distance_unit(report)),
        "unit": sentences.distance_unit(report),
        "fooled": costs.fooled(report),
        "eps_text": eps_text if "/" not in eps_text else f"{eps_text} = {eps:.4g}",
        "strip": [] if examples is None else strip(report, examples),
        "scaled": examples is not None and scaled(examples),
        "costs": costs.rows(report),
        **(shown := commands(report.environment, command(report))),
        "from_python": not shown["command"].startswith("robustkit "),
        "facts": _surroundings(report),
        "spec": dumps(report.spec, indent=2),
        "version": report.environment.get("versions", {}).get("robustkit") or "",
    }


def _distances(examples: Mapping[str, np.ndarray] | None, eps: float, name: str, unit: str) -> Markup | None:
    if examples is None or not len(examples["distance"]):
        return None
    return histogram.distances(examples["distance"], eps, name, unit)


def _surroundings(report: Report) -> list[tuple[str, str]]:
    """Return names and values of what a run depends on beside its command, as far as the record holds them."""
    spec, around = report.spec, report.environment
    versions = ", ".join(f"{name} {number}" for name, number in around.get("versions", {}).items() if number)
    named = {
        "run id": report.run_id,
        "model": f"{spec.model['string']} (sha256 {str(spec.model['fingerprint'])[:12]}…)",
        "data": f"{spec.data['string']} (sha256 {str(spec.data['fingerprint'])[:12]}…)",
        "seed": spec.seed,
        "device": around.get("device_name") or around.get("device"),
        "threads": around.get("threads"),
        "precision of the search": around.get("precision"),
        "kernels": _kernels(around.get("kernels", {})),
        "search": _search(around),
        "platform": around.get("platform"),
        "commit": around.get("commit"),
        "versions": versions,
        "parts": made_in_parts(around),
    }
    return [(name, str(value)) for name, value in named.items() if value not in (None, "")]


def _kernels(settings: Mapping[str, Any]) -> str:
    """Return what a GPU's kernels promise about equal numbers; nothing for a CPU."""
    if not settings:
        return ""
    if settings["deterministic"]:
        return "deterministic: the same command on this machine computes the same numbers"
    return (
        "verdicts by deterministic convolutions in float32; the search may differ in its last digits from run to "
        "run, which can matter for images on the decision boundary (--deterministic avoids it)"
    )


def _search(around: Mapping[str, Any]) -> str:
    """Return how full the batches were, and how many claims float32 refused."""
    if around.get("occupancy") is None:
        return ""
    return (
        f"{around['slots']} slots, {percent(around['occupancy'])} in use while images waited; "
        f"{around['claims_refused']} claims refused in float32, {around['searched_again']} images searched again"
    )


def _interval(rate: Rate) -> str:
    return sentences.interval(rate.low, rate.high)


def _short(value: float) -> str:
    return f"{value:.4g}".replace("-", "−") if abs(value) < 10000 else f"{value:,.0f}"


def _signed(value: float) -> str:
    return f"{value:+.2g}".replace("-", "−")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
