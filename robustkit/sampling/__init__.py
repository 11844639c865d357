"""Arithmetic of posterior samplers: Langevin optimisers, learning rates, moments of weights.

The scale is that of training: a loss L that is a mean over samples, with weight decay wd, of N samples in all. The
posterior at temperature T is p(w) ~ exp(-N (L(w) + wd |w|^2 / 2) / T): T = 1 is the Bayesian posterior, T = 0
plain descent. It does not depend on batch size and learning rate.
"""

from robustkit.sampling.checks import check_count
from robustkit.sampling.langevin import Langevin, PreconditionedLangevin
from robustkit.sampling.moments import Moments
from robustkit.sampling.noise import normal_like
from robustkit.sampling.rates import cosine, cyclical, is_evenly_spaced, linear, polynomial

__all__ = [
    "Langevin",
    "Moments",
    "PreconditionedLangevin",
    "check_count",
    "cosine",
    "cyclical",
    "is_evenly_spaced",
    "linear",
    "normal_like",
    "polynomial",
]
