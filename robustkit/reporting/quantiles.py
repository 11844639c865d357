"""Minimum norms as text: the quantiles of the distances, and the interval of their median."""

from __future__ import annotations

import math

from robustkit.runs.distances import Middle, Minimum


def length(value: float | None) -> str:
    """Return a distance, or a difference of two, with four digits; a dash where there is none."""
    return "–" if value is None else f"{value:.4g}".replace("-", "−")


def ends(middle: Middle) -> str:
    """Return the interval of a median."""
    if middle.low is None and middle.high is None:
        return "not known"
    return f"{length(middle.low)} – {length(middle.high)}"


def columns(minimum: Minimum) -> list[tuple[str, str]]:
    """Return name and value of each quantile as text."""
    names = {"0.5": "median"}
    return [
        (names.get(share, f"{100 * float(share):.0f} %"), length(value))
        for share, value in minimum.quantiles.items()
    ]


def sentence(minimum: Minimum) -> str:
    """Return a sentence with the interval of the median and the number of images."""
    distances = minimum.right
    none = sum(math.isinf(distance) for distance in distances)
    missing = f"; no adversarial image was found for {none:,}" if none else ""
    return (
        f"95 % interval of the median {ends(minimum.median)}, over {len(distances):,} correctly classified "
        f"image{'s' * (len(distances) != 1)}{missing}"
    )
