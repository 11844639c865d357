"""Intervals for shares where Wilson's will not do: looked at on the way, in two phases, of a group unseen."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence


def anytime_interval(hits: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return an interval for a share that holds at every n at once, so that one may look, and stop, at any time.

    All shares p whose uniform prior is less than 1 / (1 - level) times their posterior density after `hits` of n
    independent draws: the prior-posterior-ratio martingale (Waudby-Smith & Ramdas 2020, arXiv:2006.04347). Wider
    than Wilson's, by about a quarter at 1,000 images. For n = 0 it is (0, 1).
    """

    def density(p: float) -> float:
        inside = (hits * math.log(p) if hits else 0.0) + ((n - hits) * math.log1p(-p) if n > hits else 0.0)
        return inside + math.lgamma(n + 2) - math.lgamma(hits + 1) - math.lgamma(n - hits + 1)

    least = math.log(1 - level)
    share = hits / n if n else 0.5
    low = 0.0 if not hits else _root(density, least, 0.0, share)
    high = 1.0 if hits == n else _root(density, least, 1.0, share)
    return low, high


def clopper_pearson(hits: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return the interval of Clopper and Pearson, which holds at least as often as it says. For n = 0: (0, 1)."""
    if not n:
        return 0.0, 1.0
    from scipy.stats import binomtest

    low, high = binomtest(hits, n).proportion_ci(level, "exact")
    return float(low), float(high)


def median_ranks(n: int, level: float = 0.95) -> tuple[int, int]:
    """Return the indices of the two of n sorted numbers between which the median lies with this confidence.

    These are order statistics: the binomial distribution gives their confidence, whatever the numbers' own
    distribution is. (-1, n) if n is too small.
    """
    from scipy.stats import binom

    low = int(binom.ppf((1 - level) / 2, n, 0.5)) - 1
    return low, n - 1 - low


def two_phase_interval(robust: int, n: int, broken: int, audited: int, level: float = 0.95) -> tuple[float, float]:
    """Return an interval for the share that a second attack would leave too, tried on some survivors of a first.

    `robust` of n images survived the first; the second broke `broken` of `audited` drawn from those at random.
    Each phase gets half of the error, by Clopper and Pearson, so the product holds at least as often as it says.
    """
    half = (1 + level) / 2
    first, second = clopper_pearson(robust, n, half), clopper_pearson(broken, audited, half)
    return first[0] * (1 - second[1]), first[1] * (1 - second[0])


def images_for_width(share: float, width: float) -> int:
    """Return about how many images bring a `sequence` of this share down to this width."""
    n = 8
    while (ends := anytime_interval(round(share * n), n))[1] - ends[0] > width:
        n += max(1, n // 16)
    return n


def mean_cost_interval(
    lows: Sequence[float], highs: Sequence[float], n: int, most: float, level: float = 0.95, draws: int = 2000
) -> tuple[float, float]:
    """Return an interval for the mean of n costs from 0 to `most`, some of them known, drawn at random.

    Of each of the known ones an interval is given, `lows` to `highs`. Gaffke's bound (as in Learned-Miller and
    Thomas 2019, arXiv:1905.06208): what is not known is drawn from the known ones and one more, at an end, with
    random weights. So it assumes nothing of the distribution, and is wide where few are known; with all n known
    there is nothing left to draw.
    """
    import numpy as np

    m = len(lows)
    rng = np.random.default_rng(0)
    found = []
    for values, end, tail in ((lows, 0.0, (1 - level) / 2), (highs, most, (1 + level) / 2)):
        weights = rng.dirichlet(np.ones(m + 1), draws)
        counts = rng.multinomial(max(n - m, 0), weights)
        sums = sum(values) + counts @ np.array([*values, end])
        found.append(float(np.quantile(sums, tail)) / max(n, m))
    return found[0], found[1]


def _root(density: Callable[[float], float], least: float, outside: float, inside: float) -> float:
    for _ in range(60):
        midpoint = (outside + inside) / 2
        if density(midpoint) < least:
            outside = midpoint
        else:
            inside = midpoint
    return outside


def prediction_interval(counts: Sequence[tuple[int, int]], level: float = 0.95) -> tuple[float, float]:
    """Return an interval that one more group's share falls into, from hits and sizes of groups of its kind.

    Student's prediction interval on the logits of the shares (half a hit added to each side), so it stays within
    [0, 1]; no narrower than what counting alone would spread groups of these sizes, all of one share, and with the
    mean of the shares in it. It assumes that the new group is like those: an adversarially trained model is not
    like plain ones. With fewer than two groups nothing can be said: (0, 1).
    """
    if len(counts) < 2:
        return 0.0, 1.0
    from scipy.stats import t

    logits = [math.log((hits + 0.5) / (n - hits + 0.5)) for hits, n in counts]
    half = (1 + level) / 2
    counting = math.sqrt(statistics.fmean(1 / (hits + 0.5) + 1 / (n - hits + 0.5) for hits, n in counts))
    reach = max(
        float(t.ppf(half, len(logits) - 1)) * statistics.stdev(logits),
        statistics.NormalDist().inv_cdf(half) * counting,
    )
    reach *= math.sqrt(1 + 1 / len(logits))
    centre, mean = statistics.fmean(logits), statistics.fmean(hits / n for hits, n in counts)
    return min(_share(centre - reach), mean), max(_share(centre + reach), mean)


def _share(logit: float) -> float:
    return 1 / (1 + math.exp(-logit)) if logit > 0 else math.exp(logit) / (1 + math.exp(logit))
