"""Several curves over one axis, told apart by colour, dashes and signs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from robustkit.reporting.charts import svg

HEIGHT, TOP = 170.0, 10.0
FLOOR = TOP + HEIGHT
# A circle, a square, a triangle and a diamond.
SIGNS = (
    "M-3.2 0a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0 -6.4 0Z",
    "M-3 -3H3V3H-3Z",
    "M0 -3.8L3.6 3H-3.6Z",
    "M0 -4L4 0L0 4L-4 0Z",
)
# Above so many points a sign at each hides the curve: the last one alone has it.
SIGNED = 24


@dataclass(frozen=True)
class Series:
    """One curve: its name and its points, left to right; where they stand across is a share of the width."""

    name: str
    points: Sequence[tuple[float, float]]

    @property
    def last(self) -> float:
        """The value at its right end."""
        return self.points[-1][1]


@dataclass(frozen=True)
class Chart:
    """Up to four curves over an axis that is named `across` and has `marks`: a share of the width, a text.

    Values go from `low` (None: 0, or below) to `high` (None: the highest); `text` writes one.
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
        for at, words in self.marks:
            anchor = "end" if at > 0.98 else "middle"
            parts.append(svg.line(at, FLOOR, at, FLOOR + 4, "axis"))
            parts.append(svg.text(at, FLOOR + 17, words, anchor=anchor, kind="tick"))
        parts.append(svg.line(0, FLOOR, 1, FLOOR, "axis"))
        parts.append(svg.text(1, FLOOR + 34, self.across, anchor="end", kind="tick"))
        for number, series in enumerate(self.series):
            points = [(at, down(value)) for at, value in series.points]
            parts.append(svg.path(points, f"s{number}"))
            marked = points if len(points) <= SIGNED else points[-1:]
            parts += [svg.sign(at, y, SIGNS[number], f"s{number} sign") for at, y in marked]
        spoken = "; ".join(f"{series.name} ends at {self.text(series.last)}" for series in self.series)
        return svg.drawing(parts, FLOOR + 38, spoken)

    @property
    def legend(self) -> Markup:
        """What each curve is, and where it ends."""
        entries = []
        for number, series in enumerate(self.series):
            line = f'<path d="M0 6H32" class="s{number}"/>' + svg.sign(0.5, 6, SIGNS[number], f"s{number} sign")
            picture = Markup(f'<svg width="32" height="12" aria-hidden="true">{line}</svg>')
            words = Markup("{} <b>{}</b>").format(series.name, self.text(series.last))
            entries.append(Markup("<span>{}{}</span>").format(picture, words))
        return Markup('<p class="legend">{}</p>').format(Markup("").join(entries))

    def _ends(self) -> tuple[float, float]:
        values = [value for series in self.series for _, value in series.points]
        low = min(0.0, *values) if self.low is None else self.low
        high = max(low, *values) if self.high is None else self.high
        return low, high if high > low else low + 1


def counted(most: float) -> list[tuple[float, str]]:
    """Return the marks of an axis that counts from 0."""
    return [(tick / most, f"{tick:,.0f}") for tick in svg.ticks(0, most) if tick == int(tick)]


def powers(values: Sequence[float]) -> list[float]:
    """Return where these stand, ascending, on an axis of powers: from the left end to the right one."""
    low, high = math.log(values[0]), math.log(values[-1])
    return [(math.log(value) - low) / (high - low) if high > low else 0.5 for value in values]
