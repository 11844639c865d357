"""The page about a craft run: one self-contained HTML file, made from the record and its example images."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from robustkit.reporting.charts import svg
from robustkit.reporting.charts.cascade import shortened
from robustkit.reporting.charts.lines import Chart, Series, log_positions
from robustkit.reporting.charts.thumbnails import Pictures, scaled, shown
from robustkit.reporting.html.command import commands
from robustkit.reporting.html.render import render
from robustkit.reporting.html.training import percent_tick
from robustkit.reporting.names import data_name
from robustkit.reporting.sentences import class_name
from robustkit.reporting.terminal.evaluation import duration, interval, percent
from robustkit.reporting.terminal.transfer import attack_words, short_names, training_costs
from robustkit.reporting.versions import made_in_parts
from robustkit.runs.craft_record import Craft, Forecast, Judgement
from robustkit.runs.report_parts import Rate
from robustkit.runs.spec import dumps

ROW_HEIGHT = 50
# Curves in one chart; more targets get more charts.
MAX_CURVES = 4


@dataclass(frozen=True)
class CraftedImage:
    """One image to show: its pictures, and each target's prediction before and after."""

    pictures: Pictures
    index: int
    label: str
    predictions: str
    distance: str


def page(record: Craft, examples: Mapping[str, np.ndarray] | None) -> str:
    """Return the page; without examples (see `robustkit.runs.examples`) it shows no images."""
    return render("craft.html", _facts(record, examples))


def _facts(record: Craft, examples: Mapping[str, np.ndarray] | None) -> dict[str, Any]:
    spec = record.spec
    models = [one.model for one in (*record.surrogates, *record.targets)]
    names = short_names(models)
    own, others = names[: len(record.surrogates)], names[len(record.surrogates) :]
    classes = [] if examples is None else examples["classes"].tolist()
    largest = None if examples is None else float(examples["distance"].max())
    return {
        "record": record,
        "attack": attack_words(spec.attack),
        "data": data_name(spec.data["string"]),
        "verdict": _verdict(record, others),
        "surrogates": ", ".join(own),
        "gradients": f"{record.gradients_per_image:,.0f}",
        "forwards": f"{record.forwards_per_image:,.0f}",
        "seconds": duration(record.seconds),
        "largest": "" if largest is None else f"{largest:.4g}",
        "bars": _bars([(name, one.rate, _control(one)) for name, one in zip(others, record.targets, strict=True)]),
        "rows": [
            {"name": name, "own": index < len(own), "cells": _cells(one)}
            for index, (name, one) in enumerate(zip(names, (*record.surrogates, *record.targets), strict=True))
        ],
        "charts": _charts(record, others),
        "budgets": _budgets(record),
        "heads": others,
        "forecast": _forecast(record.forecast, own) if record.forecast else None,
        "strip": [] if examples is None else _strip(record, examples, classes, others),
        "scaled": examples is not None and scaled(examples),
        "png": ", ".join(f"{name} {_text(rate)}" for name, rate in zip(others, record.png.success, strict=False))
        if record.png
        else "",
        **commands(record.environment, command(record)),
        "facts": [*zip(names, models, strict=True), *_surroundings(record, own)],
        "spec": dumps(spec, indent=2),
        "version": record.environment.get("versions", {}).get("robustkit") or "",
    }


def command(record: Craft) -> str:
    """Return the shell command of a run; the Python call if models or data were given from Python."""
    spec = record.spec
    surrogates = [str(one["string"]) for one in spec.surrogates]
    data, attack = str(spec.data["string"]), str(spec.attack["string"])
    if any(text.startswith("python:") for text in (*surrogates, data)):
        words = [f'craft(surrogates, images, labels, "{spec.threat}"', f'attack="{attack}"', f"seed={spec.seed})"]
        return ", ".join(words)
    words = ["robustkit", "craft"]
    for text in surrogates:
        words += ["--surrogate", text]
    words += ["--attack", attack, "--combine", spec.combine]
    words += ["--weights", ",".join(f"{weight:g}" for weight in spec.weights)] if spec.weights else []
    words += ["--targeted", spec.targeted] if spec.targeted else []
    for judged in record.targets:
        words += ["--target", judged.model]
    words += ["--data", data, "--limit", str(record.n), "--threat", spec.threat, "--seed", str(spec.seed)]
    words += ["--forecast"] if record.forecast else []
    words += ["--budgets", ",".join(str(point.budget) for point in record.budgets)] if record.budgets else []
    return shlex.join(words)


def _verdict(record: Craft, names: Sequence[str]) -> str:
    rates = [(one.rate, name) for one, name in zip(record.targets, names, strict=True) if one.rate]
    if not rates:
        return "No target model has been evaluated on these images yet: robustkit transfer DIR --target MODEL."
    what = "reach the target class on" if record.spec.targeted else "fool"
    if len(rates) == 1:
        rate, name = rates[0]
        return f"{percent(rate.value)} of the images that {name} classified correctly {what} it."
    worst, best = (choose(rates, key=lambda pair: pair[0].value) for choose in (min, max))
    return (
        f"Of the images that a target classified correctly, {percent(best[0].value)} {what} {best[1]}, the most "
        f"of {len(rates)} targets, and {percent(worst[0].value)} {what} {worst[1]}, the least."
    )


def _control(judged: Judgement) -> float:
    """Return the higher success of the two controls."""
    return max(judged.noise or 0.0, judged.transplant or 0.0)


def _bars(rows: Sequence[tuple[str, Rate | None, float]]) -> Markup | None:
    """Return a bar and an interval for each rate, with a thin bar for the control; None for no row."""
    if not rows:
        return None
    parts, height = [], ROW_HEIGHT * len(rows)
    for share in (0, 0.25, 0.5, 0.75, 1):
        anchor = "start" if share == 0 else "end" if share == 1 else "middle"
        parts.append(svg.line(share, 0, share, height, "grid"))
        parts.append(svg.text(share, height + 14, f"{100 * share:.0f} %", anchor=anchor, kind="tick"))
    for number, (name, rate, control) in enumerate(rows):
        top = ROW_HEIGHT * number
        parts.append(svg.text(0, top + 15, shortened(name, 40), kind="name"))
        parts.append(svg.text(1, top + 15, _with_ends(rate), anchor="end"))
        if rate is None:
            continue
        if rate.value > 0:
            parts.append(svg.bar(0, top + 22, rate.value, 14, "fooled"))
        if control > 0:
            parts.append(svg.bar(0, top + 38, control, 6, "clean"))
        parts.append(svg.whisker(rate.low, rate.high, top + 29))
    spoken = "; ".join(f"{name} {_text(rate)}" for name, rate, _ in rows)
    return svg.drawing(parts, height + 18, f"Success by model: {spoken}")


def _cells(judged: Judgement) -> list[str]:
    ends = "" if judged.rate is None else interval(judged.rate)
    controls = ["–" if share is None else percent(share) for share in (judged.noise, judged.transplant)]
    return [percent(judged.clean_accuracy), _text(judged.rate), ends, f"{judged.n:,}", *controls]


def _charts(record: Craft, names: Sequence[str]) -> list[Chart]:
    """Return charts of success against gradients on a logarithmic axis, of a few targets each."""
    points = [point for point in record.budgets or () if point.gradients_per_image]
    if len(points) < 2:
        return []
    positions = log_positions([point.gradients_per_image or 1 for point in points])
    marks = [(x, f"{point.gradients_per_image:,.0f}") for x, point in zip(positions, points, strict=True)]
    found = []
    for first in range(0, len(names), MAX_CURVES):
        series = []
        for target in range(first, min(first + MAX_CURVES, len(names))):
            rates = [point.success[target] if target < len(point.success) else None for point in points]
            known = [(x, rate.value) for x, rate in zip(positions, rates, strict=True) if rate]
            series += [Series(names[target], known)] if known else []
        if series:
            found.append(Chart(series, "gradients per image", marks, percent_tick, 0.0, 1.0))
    return found


def _budgets(record: Craft) -> list[dict[str, Any]]:
    return [
        {
            "budget": f"{point.budget:,}",
            "steps": "–" if point.steps is None else f"{point.steps:,}",
            "spent": "one step costs more" if point.steps is None else f"{point.gradients_per_image or 0:,.0f}",
            "cells": [(_text(rate), interval(rate) if rate else "") for rate in point.success],
        }
        for point in record.budgets or ()
    ]


def _forecast(forecast: Forecast, names: Sequence[str]) -> dict[str, Any]:
    """Return a forecast as text and bars; images that every left-out surrogate misclassifies are not counted."""
    counts = Counter(share for share in forecast.images if share is not None)
    bars = [(f"without {name}", rate, 0.0) for name, rate in zip(names, forecast.left_out, strict=True)]
    return {
        "expected": "–" if forecast.expected is None else percent(forecast.expected),
        "ends": f"{100 * forecast.low:.1f} – {percent(forecast.high)}",
        "gradients": f"{forecast.gradients_per_image:,.0f}",
        "bars": _bars(bars),
        "counts": [(percent_tick(share), f"{count:,}") for share, count in sorted(counts.items(), reverse=True)],
    }


def _strip(
    record: Craft, examples: Mapping[str, np.ndarray], classes: list[str], names: Sequence[str]
) -> list[CraftedImage]:
    targets = list(zip(names, record.targets, strict=True)) or [("surrogate", record.surrogates[0])]
    return [
        CraftedImage(
            pictures=pictures,
            index=x,
            label=class_name(classes, label),
            predictions="; ".join(
                f"{name}: {_predictions(judged, x, label, classes)}" for name, judged in targets
            ),
            distance=f"{float(examples['distance'][x]):.4g}",
        )
        for (x, pictures), label in ((one, record.labels[one[0]]) for one in shown(examples))
    ]


def _predictions(judged: Judgement, index: int, label: int, classes: list[str]) -> str:
    """Return the predicted class, before and after where they differ."""
    before, after = (judged.predictions[kind][index] for kind in ("clean", "adversarial"))
    names = [class_name(classes, number) if number >= 0 else "not finite" for number in (before, after)]
    change = names[0] if before == after else f"{names[0]} → {names[1]}"
    return change if before == label else f"{change} (misclassified without an attack)"


def _surroundings(record: Craft, surrogates: Sequence[str]) -> list[tuple[str, str]]:
    spec, around = record.spec, record.environment
    versions = ", ".join(f"{name} {number}" for name, number in around.get("versions", {}).items() if number)
    named = {
        "run id": record.run_id,
        "data": f"{spec.data['string']} (sha256 {str(spec.data['fingerprint'])[:12]}…)",
        "seed": spec.seed,
        "training cost of the surrogates": training_costs(record, surrogates),
        "device": around.get("device_name") or around.get("device"),
        "platform": around.get("platform"),
        "commit": around.get("commit"),
        "versions": versions,
        "parts": made_in_parts(around),
    }
    return [(name, str(value)) for name, value in named.items() if value not in (None, "")]


def _with_ends(rate: Rate | None) -> str:
    return "–" if rate is None else f"{percent(rate.value)}  ({interval(rate)})"


def _text(rate: Rate | None) -> str:
    return "–" if rate is None else percent(rate.value)
