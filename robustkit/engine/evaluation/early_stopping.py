"""Runs that may stop early: images in random order, in blocks, and an interval that is valid after any block."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from robustkit.core.errors import UsageError
from robustkit.core.flags import Flag
from robustkit.core.intervals import anytime_interval, images_for_width
from robustkit.engine.evaluation.results import RunResults
from robustkit.runs.report_parts import Stop

# Images in the first block.
FIRST_BLOCK = 32


class TimeUp(Exception):
    """The time limit ended in the middle of a block."""


@dataclass(frozen=True)
class Limits:
    """When to stop: after so many `seconds`, or once robust accuracy has a 95 % interval at most `width` wide."""

    seconds: float | None = None
    width: float | None = None

    def __post_init__(self) -> None:
        """Raise UsageError for a limit out of range."""
        if self.seconds is not None and not 0 < self.seconds < float("inf"):
            raise UsageError(f"time limit {self.seconds}: write a positive number of seconds, such as 90 or 10m.")
        if self.width is not None and not 0 < self.width < 1:
            raise UsageError(f"stop at width {self.width}: write a share between 0 and 1, such as 0.02.")

    def __bool__(self) -> bool:
        """Whether there is a limit."""
        return self.seconds is not None or self.width is not None

    def blocks(self, results: RunResults, seed: int) -> Iterator[np.ndarray]:
        """Yield blocks of positions until a limit is reached; then set `results.stopped`.

        The order follows from the seed, so any number of blocks is a random sample of the data. Only finished
        blocks count: in an unfinished one the verdicts on easily fooled images come first. `results.scope` are the
        images of finished blocks; the caller raises `TimeUp` in the middle of one.
        """
        order, begun, before = shuffled(results.n, seed), time.perf_counter(), -1
        results.scope = order[:0]
        while len(results.scope) < results.n:
            taken = len(results.scope)
            size = min(max(FIRST_BLOCK, taken), results.n - taken)
            if self.width is not None and taken:
                low, high = anytime_interval(results.robust, taken)
                if high - low <= self.width:
                    results.stopped = Stop("width", results.n)
                    return
                size = min(
                    size, max(FIRST_BLOCK // 2, images_for_width(results.robust / taken, self.width) - taken)
                )
            if self.seconds is not None:
                spent = time.perf_counter() - begun
                if taken and spent >= self.seconds:
                    results.stopped = Stop("time-limit", results.n)
                    return
                if before >= 0 and taken > before:
                    size = min(size, max(1, int(0.8 * (self.seconds - spent) * (taken - before) / spent)))
            before = taken if before < 0 else before
            block = order[taken : taken + size]
            yield block
            results.scope = order[: taken + len(block)]


def unfinished_images(results: RunResults) -> list[Flag]:
    """Return a flag if images count as robust on which not all attacks ran before the time was up."""
    if not (results.stopped and results.stopped.unfinished):
        return []
    return [
        Flag(
            "unfinished-images",
            "warning",
            results.stopped.unfinished,
            f"of {len(results.scope)} images had not met all attacks when time was up: they count as robust in "
            "the accuracy, which is an upper bound, and as fooled at the lower end of its interval",
            "run the same command again to go on, or give it more time",
        )
    ]


def shuffled(n: int, seed: int) -> np.ndarray:
    """Return the positions 0 to n - 1 in an order that depends on n and the seed alone."""
    keys = [hashlib.sha256(f"{seed}/{n}/{position}".encode()).digest() for position in range(n)]
    return np.array(sorted(range(n), key=keys.__getitem__), np.int64)
