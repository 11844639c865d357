"""Several curves over one axis, distinguished by colour, dashes and markers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from robustkit.reporting.charts import svg

HEIGHT, TOP = 170.0, 10.0
FLOOR = TOP + HEIGHT
# A circle, a square, a triangle and a diamond.
MARKERS = (
    "M-3.2 0a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0 -6.4 0Z",
    "M-3 -3H3V3H-3Z",
    "M0 -3.8L3.6 3H-3.6Z",
    "M0 -4L4 0L0 4L-4 0Z",
)
# A longer curve has a marker at its last point only, because markers would hide it.
MAX_MARKERS = 24


@dataclass(frozen=True)
class Series:
    """One curve: its name and its points from left to right; x is a share of the width."""

    name: str
    points: Sequence[tuple[float, float]]

    @property
    def last(self) -> float:
        """The value at its right end."""
        return self.points[-1][1]


@dataclass(frozen=True)
class Chart:
    """Up to four curves over one axis.

    Attributes:
        series: the curves.
        across: title of the horizontal axis.
        marks: ticks of the horizontal axis: a share of the width, and its label.
        text: formats a value of the vertical axis.
        low: lower end of the vertical axis; None for 0 or the lowest value below it.
        high: upper end; None for the highest value.
    """

    series: Sequence[Series]
    across: str
    marks: Sequence[tuple[float, str]]
    text: Callable[[float], str]
    low: float | None = None
    high: float | None = None

    @property
    def drawing(self) -> Markup:
        """The curves, as an inline SVG."""
        low, high = self._ends()

        def down(value: float) -> float:
            return FLOOR - (value - low) / (high - low) * HEIGHT

        parts = []
        for level in svg.ticks(low, high, 4):
            parts.append(svg.line(0, down(level), 1, down(level), "grid"))
            parts.append(svg.text(0, down(level) + 4, self.text(level), anchor="end", kind="tick", dx=-6))
        for x, words in self.marks:
            anchor = "end" if x > 0.98 else "middle"
            parts.append(svg.line(x, FLOOR, x, FLOOR + 4, "axis"))
            parts.append(svg.text(x, FLOOR + 17, words, anchor=anchor, kind="tick"))
        parts.append(svg.line(0, FLOOR, 1, FLOOR, "axis"))
        parts.append(svg.text(1, FLOOR + 34, self.across, anchor="end", kind="tick"))
        for number, series in enumerate(self.series):
            points = [(x, down(value)) for x, value in series.points]
            parts.append(svg.path(points, f"s{number}"))
            marked = points if len(points) <= MAX_MARKERS else points[-1:]
            parts += [svg.marker(x, y, MARKERS[number], f"s{number} sign") for x, y in marked]
        spoken = "; ".join(f"{series.name} ends at {self.text(series.last)}" for series in self.series)
        return svg.drawing(parts, FLOOR + 38, spoken)

    @property
    def legend(self) -> Markup:
        """The name and the last value of each curve."""
        entries = []
        for number, series in enumerate(self.series):
            line = f'<path d="M0 6H32" class="s{number}"/>' + svg.marker(
                0.5, 6, MARKERS[number], f"s{number} sign"
            )
            picture = Markup(f'<svg width="32" height="12" aria-hidden="true">{line}</svg>')
            words = Markup("{} <b>{}</b>").format(series.name, self.text(series.last))
            entries.append(Markup("<span>{}{}</span>").format(picture, words))
        return Markup('<p class="legend">{}</p>').format(Markup("").join(entries))

    def _ends(self) -> tuple[float, float]:
        values = [value for series in self.series for _, value in series.points]
        low = min(0.0, *values) if self.low is None else self.low
        high = max(low, *values) if self.high is None else self.high
        return low, high if high > low else low + 1


def count_marks(largest: float) -> list[tuple[float, str]]:
    """Return the ticks of an axis of whole numbers from 0."""
    return [(tick / largest, f"{tick:,.0f}") for tick in svg.ticks(0, largest) if tick == int(tick)]


def log_positions(values: Sequence[float]) -> list[float]:
    """Return the positions of ascending values on a logarithmic axis, as shares of its width."""
    low, high = math.log(values[0]), math.log(values[-1])
    return [(math.log(value) - low) / (high - low) if high > low else 0.5 for value in values]
