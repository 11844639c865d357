"""The margin and its gradient at random points near images: a first look, at one point for each image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from robustkit.attack_api import Answer
from robustkit.checks import slopes
from robustkit.core.criteria import Goal
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images, PerRow

# How far the points are from the images at most, per pixel.
RADIUS = 4 / 255
# Mean changes of the margin, and errors of the gradient, above which more is measured.
MAX_SMALL_CHANGE, MAX_SMALL_ERROR = 0.25, 0.2


@dataclass(frozen=True)
class Nearby:
    """Results at one random point near each of a few correct images (B).

    Attributes:
        change: of the margin from the image to the point, relative to that of the image, at most 1 (B).
        slope_error: the larger of the gradient's median relative errors in two directions, by one-sided
            differences.
    """

    change: PerRow
    slope_error: float

    @property
    def mean_change(self) -> float:
        """The mean change of the margin."""
        return float(self.change.mean())


def measure_nearby(query: Callable[..., Answer], x: Images, goal: Goal, before: PerRow, rng: RowRng) -> Nearby:
    """Return the results at one point near each image.

    Args:
        query: from points, a goal, and whether to compute a gradient, to the model's answer with the margin.
        x: images (B C H W) that the model classifies correctly.
        goal: their labels.
        before: their margins (B).
        rng: random numbers, each image's own.
    """
    points = slopes.nearby(x, rng, RADIUS)
    there = query(points, goal)
    moved = (there.loss - before).abs() / before.abs().masked_fill(before == 0, 1.0)
    flat, error = there.gradient.flatten(1), 0.0
    for direction, size in (
        (there.gradient.sign(), flat.abs().sum(1)),
        (slopes.signs(points, rng.at(step=1)), flat.norm(dim=1)),
    ):
        ahead = query(points + slopes.STEPS[0] * direction, goal, with_gradient=False).loss
        error = max(error, slopes.one_sided_error(there, ahead, direction, size))
    return Nearby(moved.clamp(max=1), error)
