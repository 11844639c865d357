"""Square attack (Andriushchenko et al. 2020, arXiv:1912.00049), and in l1 as AutoAttack has it.

Departures from the authors' code: windows, signs and orientations are each row's own (theirs shares them in a
batch); a window may lie at the last row and column too; the first l2 and l1 pattern covers oblong and small
images; `queries` counts the start. The window's size follows the query count as in AutoAttack, whatever
`queries` is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robustkit.registry import attack
from robustkit.rows import Answer, Rows, RowWise, State
from robustkit.shapes import Images, PerRow
from robustkit.threat import per_row

# The share of pixels in a window is halved after each of these proposals.
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
TINY = 1e-12


@attack("square", paper="arXiv:1912.00049", norms=("linf", "l2", "l1"), access="score")
@dataclass(frozen=True, slots=True)
class Square(RowWise):
    """Random search by scores alone: square patches of change, kept where they raise the margin.

    `p_init` is the share of pixels in the first patches.
    """

    queries: int = 5000
    restarts: int = 1
    p_init: float = 0.8

    @property
    def loss(self) -> str:
        """What is to rise."""
        return "margin"

    @property
    def blind(self) -> bool:
        """No gradient is needed."""
        return True

    def length(self, norm: str) -> int:
        """Return the number of proposals after the start."""
        return self.queries - 1

    def init(self, rows: Rows) -> State:
        """Return stripes in linf, a grid of small patterns in l2 and l1; no score yet."""
        low = torch.full((len(rows.x),), -torch.inf, dtype=torch.float64, device=rows.x.device)
        x = _stripes(rows) if rows.threat.norm == "linf" else _tiles(rows)
        return {"x": x, "best": rows.x, "score": low, "clock": torch.zeros_like(low, dtype=torch.int64)}

    def step(self, rows: Rows, state: State, answer: Answer) -> State:
        """Keep the point asked for if it is better, and propose the best with a patch changed."""
        x, score = rows.x, answer.loss.double()
        better = score > state["score"]
        best = torch.where(per_row(better, x), state["x"], state["best"])
        side = window_side(state["clock"], self.p_init, x.shape[2:], rows.threat.norm)
        propose = _propose_linf if rows.threat.norm == "linf" else _propose
        return {
            "x": propose(rows, best, side),
            "best": best,
            "score": torch.where(better, score, state["score"]),
            "clock": state["clock"] + 1,
        }


def window_side(proposal: Tensor, p_init: float, size: tuple[int, ...], norm: str) -> Tensor:
    """Return the side of the window in pixels, at each row's proposal number (from 0)."""
    height, width = size
    halvings = torch.bucketize(proposal, torch.tensor(HALVINGS, device=proposal.device))
    side = (p_init * height * width / 2.0**halvings).sqrt().round().long()
    if norm != "linf":
        side = side.clamp(min=3)
        side = side + (side % 2 == 0)
    return side.clamp(min=1, max=min(height, width))


def _stripes(rows: Rows) -> Images:
    """Return vertical stripes of plus and minus eps."""
    _, channels, _, width = rows.x.shape
    signs = _signs(rows.rng.uniform(channels, 1, width)).to(rows.x.dtype)
    return rows.threat.project(rows.x + rows.threat.radius * signs, rows.x)


def _propose_linf(rows: Rows, best: Images, side: Tensor) -> Images:
    """Return the best points with one window shifted by twice eps up or down, each channel as a whole."""
    draws = rows.rng.uniform(2 + best.shape[1])
    window = _window(draws[:, :2], side, best)
    signs = per_row_and_channel(_signs(draws[:, 2:]), best)
    return rows.threat.project(best + window * (2 * rows.threat.radius) * signs, rows.x)
