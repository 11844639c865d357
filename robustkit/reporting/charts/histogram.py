"""Histograms: of margins, and of the distances of the fooled images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from robustkit.reporting.charts import svg
from robustkit.runs.evaluation_record import Report

HEIGHT, TOP = 150.0, 34.0
KINDS = ("robust", "fooled", "clean")


@dataclass(frozen=True)
class Axis:
    """The horizontal axis: its ends, the edges of the bins, its unit, and a marked value with its name."""

    low: float
    high: float
    edges: np.ndarray
    unit: str
    mark: float
    name: str

    def at(self, value: float) -> float:
        """Return the position of a value as a share of the width."""
        return (value - self.low) / (self.high - self.low)


def margins(report: Report) -> tuple[Markup, int]:
    """Return the chart of all margins, split by verdict, and the number of images beyond its ends.

    0 is an edge between bins, so that no bar mixes correct and misclassified images.
    """
    values = np.array([image.margin for image in report.verdicts])
    kinds = np.array(
        [
            "robust" if image.robust else "clean" if image.attack == "clean" else "fooled"
            for image in report.verdicts
        ]
    )
    low, high = np.quantile(values, [0.005, 0.995]) if len(values) >= 200 else (values.min(), values.max())
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    width = (high - low) / _bins(len(values)) or 1.0
    first, last = math.floor(low / width - 1e-9), math.ceil(high / width + 1e-9)
    edges = width * np.arange(first, last + 1)
    # A margin of exactly 0 is a tie; the verdict decides on which side of 0 it is drawn.
    below = np.nextafter(0.0, -1.0)
    drawn = np.where((values == 0) & (kinds != "robust"), below, values).clip(edges[0], edges[-1])
    axis = Axis(edges[0], edges[-1], edges, "margin in logits", 0.0, "0")
    beyond = int(((values < edges[0]) | (values > edges[-1])).sum())
    return _chart({kind: drawn[kinds == kind] for kind in KINDS}, axis, "Margins"), beyond


def distances(values: np.ndarray, eps: float, name: str, unit: str) -> Markup:
    """Return the chart of the distances of fooled images, from 0 to eps, which is marked."""
    top = max(eps, float(values.max())) or 1.0
    axis = Axis(0.0, 1.03 * top, np.linspace(0, top, _bins(len(values)) + 1), unit, eps, name)
    return _chart({"fooled": values}, axis, "Distances of the fooled images")


def _bins(n: int) -> int:
    return int(min(40, max(12, 2 * math.sqrt(n))))


def _chart(groups: Mapping[str, np.ndarray], axis: Axis, title: str) -> Markup:
    counts = {kind: np.histogram(values, axis.edges)[0] for kind, values in groups.items()}
    most = int(np.sum(list(counts.values()), axis=0).max())
    levels = [level for level in svg.ticks(0, most, 4) if level == int(level)]
    unit = HEIGHT / most
    floor = TOP + HEIGHT
    parts = [svg.text(0, 11, "images", kind="tick", dx=-30)]
    for level in levels:
        parts.append(svg.line(0, floor - level * unit, 1, floor - level * unit, "grid"))
        parts.append(svg.text(0, floor - level * unit + 4, f"{level:,.0f}", anchor="end", kind="tick", dx=-6))
    for column, edge in enumerate(axis.edges[:-1]):
        left, right = axis.at(edge), axis.at(axis.edges[column + 1])
        parts += _column([(kind, int(counts[kind][column])) for kind in counts], left, right - left, unit)
    for tick in svg.ticks(axis.low, axis.high):
        at = axis.at(tick)
        parts.append(svg.line(at, floor, at, floor + 4, "axis"))
        parts.append(svg.text(at, floor + 17, f"{tick:g}".replace("-", "−"), anchor="middle", kind="tick"))
    at = axis.at(axis.mark)
    anchor = "start" if at < 0.2 else "end" if at > 0.8 else "middle"
    parts += [svg.line(0, floor, 1, floor, "axis"), svg.line(at, TOP - 12, at, floor, "mark")]
    parts.append(svg.text(at, TOP - 16, axis.name, anchor=anchor, kind="name"))
    parts.append(svg.text(1, floor + 34, axis.unit, anchor="end", kind="tick"))
    return svg.drawing(parts, floor + 38, f"{title}; {sum(map(len, groups.values())):,} images")


def _column(stack: Sequence[tuple[str, int]], left: float, width: float, unit: float) -> list[str]:
    parts, floor = [], TOP + HEIGHT
    for kind, count in stack:
        if count:
            floor -= count * unit
            parts.append(svg.bar(left + 0.06 * width, floor, 0.88 * width, count * unit, kind))
    return parts
