"""Square attack (Andriushchenko et al. 2020, arXiv:1912.00049), and in l1 as AutoAttack has it.

Departures from the authors' code: windows, signs and orientations are drawn for each row (in theirs for the
batch); a window may also lie at the last row and column; the first l2 and l1 pattern covers oblong and small
images; `queries` includes the start. The window's size depends on the query count as in AutoAttack, for any number
of `queries`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from robustkit.attack_api import Answer, LoopOptions, Rows, RowWise, State
from robustkit.core.limits import Limits
from robustkit.core.shapes import Images, Mask, PerRow
from robustkit.core.threat import per_row
from robustkit.registry import attack
from robustkit.registry.ranges import Count, NonNegative, PositiveShare

# The share of pixels in a window is halved after each of these proposals.
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
TINY = 1e-12
# Between the draw 0.5 and the next smaller one, which is a multiple of 2**-24.
BELOW_HALF = 0.5 - 2.0**-25
# The share of pixels in the first windows, as in AutoAttack.
P_INIT = 0.8
# Pairs of a number of queries and a share of the clean margin. Of 119 searches on open nets and masked defenses
# that succeeded after the first number, by which these were chosen, all but one had removed more (docs/rapid.md).
CHECKPOINTS = ((200, 0.25), (500, 0.5), (1000, 0.6), (1500, 0.75), (2000, 0.85), (3000, 0.95), (4000, 0.95))


@attack("square", paper="arXiv:1912.00049", norms=("linf", "l2", "l1"), access="score")
@dataclass(frozen=True, slots=True)
class Square(RowWise):
    """Random search by scores: square patches, kept if they raise the loss.

    `p_init` is the share of pixels in the first patches. With `patience` a sample stops after that many queries
    unless the margin has then changed by `rivalry` times the change that earlier attacks of the run reached, and
    after ten times as many unless it has changed by the same: if gradients are reliable, they reach much more than
    so few queries. With `refine` it begins at the point with the smallest margin that earlier attacks found, if
    there is one.
    """

    queries: Annotated[int, Limits(1, 100_000_000)] = 5000
    restarts: Count = 1
    p_init: PositiveShare = P_INIT
    patience: Count | None = None
    rivalry: NonNegative = 0.5
    refine: bool = False

    @property
    def loss(self) -> str:
        """The loss to maximise."""
        return "margin"

    @property
    def steps(self) -> int:
        """The number of proposals after the start."""
        return self.queries - 1

    def loop_options(self, norm: str) -> LoopOptions:
        """Return the loop's options; no gradient is needed, and a short search checks gradients."""
        check = self.patience is not None or self.refine
        # They were measured on searches from scratch.
        checkpoints = () if check or self.p_init != P_INIT else CHECKPOINTS
        return LoopOptions(
            self.steps,
            restarts=self.restarts,
            needs_gradient=False,
            score_check=check,
            checkpoints=checkpoints,
        )

    def init(self, rows: Rows) -> State:
        """Return stripes in linf, a grid of small patterns in l2 and l1; no score yet."""
        low = torch.full((len(rows.x),), -torch.inf, dtype=torch.float64, device=rows.x.device)
        if self.refine and rows.nearest is not None:
            x = rows.nearest
        else:
            x = _stripes(rows) if rows.threat.norm == "linf" else _tiles(rows)
        return {
            "x": x,
            "best": rows.x,
            "score": low,
            "last": torch.zeros_like(low, dtype=torch.bool),
        }

    def step(self, rows: Rows, state: State, answer: Answer) -> State:
        """Keep the query point if it is better, and propose the best point with another patch."""
        x, score = rows.x, answer.loss.double()
        better = score > state["score"]
        best = torch.where(per_row(better, x), state["x"], state["best"])
        score = torch.where(better, score, state["score"])
        side = window_side(rows.steps_taken - 1, self.p_init, x.shape[2:], rows.threat.norm)
        propose = _propose_linf if rows.threat.norm == "linf" else _propose
        return {
            "x": propose(rows, best, side),
            "best": best,
            "score": score,
            "last": self._last(rows, state["last"], score),
        }

    def _last(self, rows: Rows, last: Mask, score: PerRow) -> Mask:
        """Return the rows that end because their margin has changed too little; `last` where no test is due."""
        if self.patience is None or rows.past is None:
            return last
        due = np.where(rows.steps_taken == self.patience - 1, self.rivalry, 0.0)
        due = np.where(rows.steps_taken == 10 * self.patience - 1, 1.0, due)
        if not due.any():
            return last
        clean, nearest = rows.past.unbind(1)
        share = rows.upload(due)
        return (share > 0) & (nearest > clean) & (score - clean < share * (nearest - clean))


def window_side(proposal: np.ndarray, p_init: float, size: tuple[int, ...], norm: str) -> np.ndarray:
    """Return the side of the window in pixels, at each row's proposal number (from 0)."""
    height, width = size
    sides: np.ndarray = _sides(p_init, height, width, norm)[np.searchsorted(HALVINGS, proposal)]
    return sides


@functools.cache
def _sides(p_init: float, height: int, width: int, norm: str) -> np.ndarray:
    """Return the side of the window after each number of halvings."""
    halvings = np.arange(len(HALVINGS) + 1, dtype=np.float32)
    side = np.sqrt(np.float32(p_init * height * width) / 2**halvings).round().astype(np.int64)
    if norm != "linf":
        side = np.maximum(side, 3)
        side = side + (side % 2 == 0)
    clipped: np.ndarray = np.clip(side, 1, min(height, width))
    return clipped


def pattern(down: Tensor, across: Tensor, side: Tensor, norm: str) -> Tensor:
    """Return a peak above a trough, of length 1, at pixels counted from a window's corner; zero outside it.

    Both are sums of nested rectangles whose heights fall with the square (l2) or fourth power (l1) of their
    number. All arguments broadcast to (B, H, W).
    """
    inside = _inside(down, across, side)
    above = down < side // 2
    part = torch.where(above, side // 2, side - side // 2)
    ring = torch.maximum((down - torch.where(above, 0, side // 2) - part // 2).abs(), (across - side // 2).abs())
    most = max(*down.shape[-2:], *across.shape[-2:]) + 2
    numbers = torch.arange(1, most, dtype=torch.float64, device=down.device)
    sums = torch.nn.functional.pad((1 / numbers ** (2 if norm == "l2" else 4)).cumsum(0), (1, 0))
    value = torch.where(inside, sums[side // 2 + 1] - sums[ring.clamp(max=len(sums) - 1)], 0)
    peak, trough = torch.where(above, value, 0), torch.where(above, 0, value)
    value = peak / (TINY + _length(peak, norm)) - trough / (TINY + _length(trough, norm))
    return value / (TINY + _length(value, norm))


def _stripes(rows: Rows) -> Images:
    """Return vertical stripes of plus and minus eps."""
    _, channels, _, width = rows.x.shape
    signs = _signs(rows.rng.uniform(channels, 1, width)).to(rows.x.dtype)
    return rows.project(rows.x + rows.threat.radius * signs)


def _tiles(rows: Rows) -> Images:
    """Return a grid of patterns, about five a side, each with its own sign in every channel and orientation."""
    x, norm = rows.x, rows.threat.norm
    channels, height, width = x.shape[1:]
    side = max(min(height, width) // 5, 1)
    down, tile_down, count_down = _grid(height, side, x)
    across, tile_across, count_across = _grid(width, side, x)
    tile = tile_down[:, None] * count_across + tile_across[None, :]
    inside = (tile_down[:, None] >= 0) & (tile_across[None, :] >= 0)
    ticks = torch.arange(side, device=x.device)
    upright = pattern(ticks[:, None], ticks[None, :], torch.tensor(side, device=x.device), norm)
    draws = rows.rng.uniform(channels + 1, count_down * count_across)[:, :, tile.clamp(min=0)]
    lying = draws[:, :1] < 0.5
    shape = torch.where(lying, upright.T[down][:, across], upright[down][:, across])
    return _into_ball(rows, _signs(draws[:, 1:]) * shape * inside)


def _grid(size: int, side: int, like: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return each pixel's position in its tile, its tile's number (-1: none), and the number of tiles."""
    count = size // side
    pixel = torch.arange(size, device=like.device) - (size - count * side) // 2
    number = pixel.div(side, rounding_mode="floor")
    return pixel % side, torch.where(number < count, number, -1).clamp(min=-1), count


def _propose_linf(rows: Rows, best: Images, sides: np.ndarray) -> Images:
    """Return the best points with one window changed by plus or minus twice eps, one sign per channel."""
    height, width = best.shape[2:]
    draws = rows.rng.uniform(2 + best.shape[1])
    # A pixel lies in a window if twice its distance from the window's middle is less than the side.
    most = max(height, width)
    pixels = torch.arange(1, 2 * most, 2, device=best.device)
    side, corner = _corners(rows, draws[:, :2], sides, best)
    middle = (2 * corner + side[:, None])[:, :, None]
    inside = (pixels - middle).abs() < side[:, None, None]
    window = inside[:, :1, :height, None] & inside[:, 1:, None, :width]
    shift = 2 * rows.threat.radius * _signs(draws[:, 2:, None, None]).to(best.dtype)
    return rows.project(best + window * shift)


def _propose(rows: Rows, best: Images, sides: np.ndarray) -> Images:
    """Return the best points with the change of one window moved to another window, with a new pattern."""
    norm, channels = rows.threat.norm, best.shape[1]
    draws = rows.rng.uniform(5 + channels)
    change = best - rows.x
    side, corner = _corners(rows, draws[:, :2], sides, best)
    down, across = _window(corner, best)
    other_down, other_across = _window(_corners(rows, draws[:, 2:4], sides, best)[1], best)
    side = per_row(side, down)
    here, there = _inside(down, across, side)[:, None], _inside(other_down, other_across, side)[:, None]
    lying = draws[:, 4, None, None] < 0.5
    upright = pattern(down, across, side, norm)
    shape = torch.where(lying, pattern(across, down, side, norm), upright)[:, None].to(best.dtype)
    old = change * here
    new = _signs(draws[:, 5:, None, None]).to(best.dtype) * shape + old / (TINY + _length(old, norm))
    free = _length(change * (here | there), norm)
    total, eps = per_row(rows.threat.distance(best, rows.x), best), rows.threat.radius
    if norm == "l2":
        room = ((eps**2 - total**2).clamp(min=0) / channels + free**2).sqrt()
    else:
        room = ((eps - total).clamp(min=0) / channels + free) * channels
    new = new * (room / (TINY + _length(new, norm))).to(best.dtype)
    return _into_ball(rows, torch.where(here, new, torch.where(there, 0, change)))


def _into_ball(rows: Rows, change: Tensor) -> Images:
    """Return the clean images with this change, scaled to length eps in l2 and projected onto the ball in l1."""
    x, threat = rows.x, rows.threat
    if threat.norm == "l2":
        change = change * threat.radius / (TINY + per_row(change.flatten(1).norm(dim=1), change))
    return rows.retract(x + change.to(x.dtype))


def _corners(rows: Rows, draws: Tensor, sides: np.ndarray, like: Images) -> tuple[Tensor, Tensor]:
    """Return the sides (B) on the images' device, and the corners (B 2) of windows drawn evenly."""
    places = np.array(like.shape[2:]) - sides[:, None] + 1
    numbers = rows.upload(np.concatenate([sides[:, None], places], 1))
    return numbers[:, 0], (draws.double() * numbers[:, 1:]).long()


def _window(corner: Tensor, like: Images) -> tuple[Tensor, Tensor]:
    """Return the pixels' rows (B, H, 1) and columns (B, 1, W) from the corners of windows."""
    height, width = like.shape[2:]
    rows = torch.arange(height, device=like.device)[None, :] - corner[:, :1]
    columns = torch.arange(width, device=like.device)[None, :] - corner[:, 1:]
    return rows[:, :, None], columns[:, None, :]


def _inside(down: Tensor, across: Tensor, side: Tensor) -> Tensor:
    """Return which pixels, counted from a window's corner, lie in it."""
    return (down >= 0) & (down < side) & (across >= 0) & (across < side)


def _length(values: Tensor, norm: str) -> Tensor:
    """Return the length over the last two axes, which are kept."""
    length: Tensor = torch.linalg.vector_norm(values, 2.0 if norm == "l2" else 1.0, dim=(-2, -1), keepdim=True)
    return length


def _signs(draws: Tensor) -> Tensor:
    """Return -1 or 1 for draws from [0, 1)."""
    return (draws - BELOW_HALF).sign()
