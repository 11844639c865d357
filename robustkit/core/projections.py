"""Arithmetic of the projections onto the intersection of a norm ball and the box, for l2 and l1.

All functions take shifts (B D) from the clean images, float64, with bounds `low` <= 0 <= `high` (B D) of the
box and the radius (B 1) of the ball.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robustkit.core.shapes import Images


def clip_l2(shift: Tensor, low: Tensor, high: Tensor, radius: Tensor) -> Tensor:
    """Return the nearest point in ball and box, before the last rounding; arguments as in `Clip`."""
    # The nearest point is clip(s * shift, low, high) with the scale 0 < s <= 1 that gives length eps.
    # The squared length is piecewise quadratic in s; its pieces end where a coordinate meets its bound.
    bound = torch.where(shift > 0, high, low)
    meets = torch.where(shift == 0, math.inf, bound / torch.where(shift == 0, 1.0, shift))
    order = meets.argsort(dim=1)
    ends = meets.gather(1, order)
    held = bound.square().gather(1, order).cumsum(1)
    free = shift.square().gather(1, order).flip(1).cumsum(1).flip(1)
    held = torch.cat([torch.zeros_like(held[:, :1]), held[:, :-1]], 1)
    # Piece k has the first k coordinates held and scales up to ends[k].
    scale = ((radius**2 - held).clamp(min=0) / free.clamp(min=1e-300)).sqrt()
    piece = (scale <= ends).to(torch.uint8).argmax(1, keepdim=True)
    outside = torch.clamp(shift, low, high).norm(dim=1, keepdim=True) > radius
    best = torch.where(outside, scale.gather(1, piece).clamp(max=1.0), 1.0)
    clipped = torch.clamp(best * shift, low, high)
    return clipped


def clip_l1(shift: Tensor, low: Tensor, high: Tensor, radius: Tensor) -> Tensor:
    """Return the nearest point in ball and box, before the last rounding; arguments as in `Clip`."""
    # The nearest point has sizes min(max(|shift| - t, 0), room) with the threshold t >= 0 that makes
    # them sum to eps. The sum falls piecewise linearly in t: a coordinate begins to shrink at
    # |shift| - room and is gone at |shift|.
    size = shift.abs()
    room = torch.where(shift > 0, high, -low)
    begins = (size - room).clamp(min=0)
    knots, order = torch.cat([begins, size], 1).sort(dim=1)
    change = torch.cat([-torch.ones_like(size), torch.ones_like(size)], 1).gather(1, order)
    slope = change.cumsum(1)[:, :-1]
    total = torch.minimum(size, room).sum(1, keepdim=True)
    sums = torch.cat([total, total + (slope * knots.diff(dim=1)).cumsum(1)], 1)
    piece = ((sums > radius).sum(1, keepdim=True) - 1).clamp(min=0, max=slope.shape[1] - 1)
    fall = slope.gather(1, piece)
    step = (radius - sums.gather(1, piece)) / torch.where(fall == 0, -1.0, fall)
    threshold = torch.where(total > radius, knots.gather(1, piece) + step, 0.0)
    sizes = torch.minimum((size - threshold).clamp(min=0), room)
    return sizes * shift.sign()


def steepest_l1(gradient: Images, room: Images, density: float) -> Images:
    """Return the steepest direction of l1 norm 1.

    Args:
        gradient: gradient (B C H W).
        room: the largest size (B C H W) of each coordinate; if all are too small, the norm is below 1.
        density: share of the coordinates, largest gradients first, that the direction can have.
    """
    size, order = gradient.flatten(1).abs().sort(dim=1, descending=True, stable=True)
    most = min(max(1, round(density * size.shape[1])), size.shape[1])
    count = (size > 0).sum(1, keepdim=True).clamp(1, most)
    # In shares of 1 / count, so that whole shares add up without rounding.
    part = (room.flatten(1).gather(1, order).double() * count).clamp(max=1) * (size > 0)
    part = torch.minimum(part, (count - part.cumsum(1) + part).clamp(min=0)) / count
    sizes = torch.zeros_like(size).scatter(1, order, part.to(size.dtype))
    return sizes.view_as(gradient) * gradient.sign()
