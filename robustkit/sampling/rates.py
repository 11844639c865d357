"""Learning rates as functions of the 0-based step, and evenly spaced steps."""

from __future__ import annotations

import math


def cosine(step: int, length: int, peak: float) -> float:
    """Return the rate that falls from `peak` at step 0 to 0 at step `length`."""
    return 0.5 * peak * (1 + math.cos(math.pi * step / length))


def cyclical(step: int, length: int, peak: float) -> float:
    """Return the cosine rate that starts again every `length` steps (Zhang et al. 2020, arXiv:1902.03932).

    It is above 0 at a cycle's last step, so that samples still change.
    """
    return cosine(step % length, length, peak)


def polynomial(time: float, peak: float, power: float) -> float:
    """Return `peak` times (1 + time)^-power.

    For a power above 1/2 and up to 1 its sum is infinite and the sum of its squares is not, as Welling & Teh
    (2011) require.
    """
    return float(peak * (1 + time) ** -power)


def linear(step: int, length: int, peak: float, floor: float) -> float:
    """Return SWAG's learning rate (Maddox et al. 2019, arXiv:1902.02476).

    It is `peak` up to a half of `length`, falls linearly up to nine tenths, and is `floor` afterwards.
    """
    fallen = min(max((step / length - 0.5) / 0.4, 0.0), 1.0)
    return peak * (1 - fallen) + floor * fallen


def is_evenly_spaced(step: int, length: int, count: int) -> bool:
    """Return whether a step is one of `count` evenly spaced steps among `length`, including the last one."""
    return 0 <= step < length and (step + 1) * count // length > step * count // length
