"""SVG elements with horizontal positions in percent of the width and text of fixed size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from markupsafe import Markup, escape

from robustkit.core.errors import printable


def drawing(parts: Iterable[str], height: float, title: str) -> Markup:
    """Return an inline SVG of full width, with a title for screen readers."""
    body = "".join(parts)
    size = f'width="100%" height="{_n(height)}"'
    return Markup(f'<svg class="chart" role="img" {size} aria-label="{escape(printable(title))}">{body}</svg>')


def bar(x: float, y: float, width: float, height: float, kind: str) -> str:
    """Return a bar; x and width as shares of the drawing, y and height in pixels."""
    return (
        f'<rect x="{_n(100 * x)}%" y="{_n(y)}" width="{_n(100 * width)}%" height="{_n(height)}" class="{kind}"/>'
    )


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """Return a line; x as shares of the drawing, y in pixels."""
    return f'<line x1="{_n(100 * x1)}%" y1="{_n(y1)}" x2="{_n(100 * x2)}%" y2="{_n(y2)}" class="{kind}"/>'


def dot(x: float, y: float, kind: str) -> str:
    """Return a dot at a share of the width and y pixels down."""
    return f'<circle cx="{_n(100 * x)}%" cy="{_n(y)}" r="3" class="{kind}"/>'


def area(top: Iterable[tuple[float, float]], bottom: Iterable[tuple[float, float]], kind: str) -> str:
    """Return the area between two lines of points (x as a share of the drawing, y in pixels), left to right.

    A path has no percentages, so it is drawn in units of its own and stretched to the width.
    """
    points = [*top, *reversed(list(bottom))]
    return _stretched(points, "Z", f'class="{kind}"')


def path(points: Iterable[tuple[float, float]], kind: str) -> str:
    """Return a line through points (x as a share of the drawing, y in pixels); its dashes are not stretched."""
    return _stretched(list(points), "", f'class="{kind}" vector-effect="non-scaling-stroke"')


def marker(x: float, y: float, shape: str, kind: str) -> str:
    """Return a small shape, a path around 0 0 in pixels, at a share of the width and y pixels down."""
    inside = f'<path d="{shape}" class="{kind}"/>'
    return f'<svg x="{_n(100 * x)}%" y="{_n(y)}" width="1" height="1" overflow="visible">{inside}</svg>'


def text(x: float, y: float, content: str, *, anchor: str = "start", kind: str = "label", dx: float = 0) -> str:
    """Return a line of text at a share of the width and y pixels down, moved right by dx pixels."""
    shift = f' dx="{_n(dx)}"' if dx else ""
    position = f'x="{_n(100 * x)}%" y="{_n(y)}"{shift} text-anchor="{anchor}"'
    return f'<text {position} class="{kind}">{escape(printable(content))}</text>'


def whisker(low: float, high: float, y: float) -> str:
    """Return an interval: a line with end marks, over a halo that makes it visible on any bar."""
    strokes = [(low, y, high, y), (low, y - 4, low, y + 4), (high, y - 4, high, y + 4)]
    return "".join(line(*stroke, kind) for kind in ("halo", "whisker") for stroke in strokes)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return round numbers inside [low, high], about so many."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def shares_against(widest: float, floor: float, height: float, unit: str) -> list[str]:
    """Return the axes of a chart of shares against a length.

    Args:
        widest: the length at the right edge; the left one is 0.
        floor: pixels from the top down to share 0.
        height: pixels from share 0 up to share 1.
        unit: what the length is, written below the axis.
    """
    parts = [text(1, floor + 34, unit, anchor="end", kind="tick")]
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = floor - share * height
        parts += [
            line(0, y, 1, y, "grid"),
            text(0, y + 4, f"{100 * share:.0f} %", anchor="end", kind="tick", dx=-6),
        ]
    for tick in ticks(0, widest):
        x = tick / widest
        parts.append(line(x, floor, x, floor + 4, "axis"))
        parts.append(text(x, floor + 17, f"{tick:g}", anchor="end" if x > 0.98 else "middle", kind="tick"))
    return parts


def _stretched(points: Sequence[tuple[float, float]], end: str, about: str) -> str:
    path = "L".join(f"{_n(1000 * x)} {_n(y)}" for x, y in points)
    height = _n(max(y for _, y in points))
    box = f'width="100%" height="{height}" viewBox="0 0 1000 {height}" preserveAspectRatio="none"'
    return f'<svg {box} overflow="visible"><path d="M{path}{end}" {about}/></svg>'


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
