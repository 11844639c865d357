"""RayS (Chen & Gu 2020, arXiv:2006.12792): a search by predicted labels for the ray with the nearest boundary.

The perturbation is a vector of signs times a radius. Blocks of signs are flipped, in finer and finer blocks; a
flip is kept if the image is still misclassified at the best radius so far, which bisection then reduces.

Departures from the authors' code: the first query is at radius 1, which reaches every corner of the box, instead
of a radius that is doubled until the label changes; while no direction has been found each flip is tried at
radius 1, where theirs gives up; the tolerance is at most a twentieth of eps; after blocks of single values the
search begins again with the whole vector, where theirs ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from robustkit.attack_api import Answer, Rows, State
from robustkit.attacks.score.labels_only import LabelsOnly
from robustkit.core.limits import Limits
from robustkit.core.shapes import Images, Mask
from robustkit.core.threat import ThreatModel, per_row
from robustkit.registry import attack
from robustkit.registry.ranges import PositiveShare

# The radius from which the search starts: all of the box.
LARGEST = 1.0
# A bisection ends at this part of eps, where that is smaller than the tolerance.
EPS_PARTS = 20


@attack("rays", paper="arXiv:2006.12792", norms=("linf",), access="decision")
@dataclass(frozen=True, slots=True)
class RayS(LabelsOnly):
    """Search by labels alone: directions of signs, flipped block by block, with bisection of the radius.

    `queries` is the most queries of an image; `tolerance` is the width in pixels at which a bisection ends.
    """

    queries: Annotated[int, Limits(1, 100_000_000)] = 1000
    tolerance: PositiveShare = 0.001

    def init(self, rows: Rows) -> State:
        """Return the first query: all values raised as far as the box allows."""
        ones = torch.ones_like(rows.x)
        radius = torch.full((len(rows.x),), LARGEST, dtype=torch.float64, device=rows.x.device)
        zero = torch.zeros_like(radius, dtype=torch.int64)
        return {
            "x": _at(rows, ones, radius),
            "sign": ones,
            "trial": ones,
            "radius": radius,
            "low": torch.zeros_like(radius),
            "high": radius,
            "bisecting": zero.bool(),
            "level": zero,
            "block": zero - 1,
        }

    def step(self, rows: Rows, state: State, answer: Answer) -> State:
        """Keep or drop the direction of the query, bisect, or propose the next direction."""
        fooled, bisecting = answer.loss > 0.5, state["bisecting"]
        queried = torch.where(bisecting, (state["low"] + state["high"]) / 2, state["radius"])
        high = torch.where(fooled, queried, state["high"])
        low = torch.where(bisecting & ~fooled, queried, state["low"])
        accepted = bisecting | fooled
        going_on = accepted & (high - low > self._tolerance(rows.threat))
        sign = torch.where(per_row(accepted, rows.x), state["trial"], state["sign"])
        radius = torch.where(accepted, high, state["radius"])
        level, block = _next_block(rows.x, state["level"], state["block"], ~going_on)
        flipped = torch.where(_in_block(rows.x, level, block), -sign, sign)
        trial = torch.where(per_row(going_on, rows.x), state["trial"], flipped)
        point = torch.where(going_on, (low + high) / 2, radius)
        return {
            "x": _at(rows, trial, point),
            "sign": sign,
            "trial": trial,
            "radius": radius,
            "low": torch.where(going_on, low, 0.0),
            "high": torch.where(going_on, high, radius),
            "bisecting": going_on,
            "level": level,
            "block": block,
        }

    def _tolerance(self, threat: ThreatModel) -> float:
        return self.tolerance if threat.minimal else min(self.tolerance, threat.radius / EPS_PARTS)


def _at(rows: Rows, sign: Images, radius: Tensor) -> Images:
    """Return the points at this radius (B) along these directions, inside the box."""
    return (rows.x + sign * per_row(radius, rows.x).to(rows.x.dtype)).clamp(0, 1)


def _next_block(x: Images, level: Tensor, block: Tensor, moves: Mask) -> tuple[Tensor, Tensor]:
    """Return level and block (B) of the next flip: 2 ** level blocks, then twice as many, then one again."""
    size = x[0].numel()
    block = torch.where(moves, block + 1, block)
    over = block * _block_size(level, size) >= size
    level = torch.where(over, level + 1, level)
    level = torch.where(level > (size - 1).bit_length(), 0, level)
    return level, torch.where(over, 0, block)


def _in_block(x: Images, level: Tensor, block: Tensor) -> Mask:
    """Return which values of the images lie in each row's block (B C H W)."""
    place = torch.arange(x[0].numel(), device=x.device).view(1, *x.shape[1:])
    width = _block_size(level, x[0].numel())
    begin = per_row(block * width, x)
    return (place >= begin) & (place < begin + per_row(width, x))


def _block_size(level: Tensor, size: int) -> Tensor:
    blocks = torch.bitwise_left_shift(torch.ones_like(level), level)
    return torch.div(size + blocks - 1, blocks, rounding_mode="floor")
