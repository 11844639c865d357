"""Signs I2 to I4 that an attack failed for its own reasons (Pintor et al. 2022, "Indicators of Attack Failure").

arXiv:2106.09947. Each is a pure function of the values of a run: gradients, losses, whether points fooled the
model. Losses rise towards success here; theirs fall. I3 is computed from its definition (their code takes the
argmax of labels), and I4 is defined for every path: theirs skips the rescaling of a path whose maximum is 0,
divides by zero on a constant one, and changes the caller's array.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images, Mask, PerRow

# Width of the noise of I2, in [0, 1] pixel units, and its draws.
RHO, DRAWS = 8 / 255, 100
# The number of last steps that I4 uses, and the share of the whole rise that they may still gain.
LAST, GAIN = 10, 0.05


def unstable(loss: PerRow, around: Tensor) -> PerRow:
    """I2: how much the loss (B) differs from those nearby (draws B), relative to itself, at most 1.

    Where the loss is zero the difference itself counts.
    """
    size = torch.where(loss == 0, 1.0, loss.abs())
    return ((around - loss).abs() / size).mean(0).clamp(max=1)


def nearby(x: Images, rng: RowRng, draws: int = DRAWS, rho: float = RHO) -> Iterator[Images]:
    """Yield images (B C H W) whose pixels differ from x by at most half of rho, so often, for `unstable`."""
    rows = replace(rng, ids=rng.ids.repeat(draws), step=torch.arange(draws).repeat_interleave(len(x)).to(x.device))
    noise = rows.uniform(*x.shape[1:]).view(draws, *x.shape)
    yield from (x + rho * (shift - 0.5).to(x.dtype) for shift in noise)


def silent(fooled: Tensor) -> Mask:
    """I3: which rows of successes at the queries (B T) end in failure though an earlier point was a success."""
    return fooled[:, :-1].any(1) & ~fooled[:, -1]


def incomplete(losses: Tensor) -> Mask:
    """I4: which rows' losses (B T) still rose by a twentieth of their range in the last ten steps."""
    low, high = losses.amin(1, keepdim=True), losses.amax(1, keepdim=True)
    share = (losses - low) / torch.where(high > low, high - low, 1.0)
    best = share.cummax(1).values[:, -LAST:]
    return best.amax(1) - best.amin(1) > GAIN
