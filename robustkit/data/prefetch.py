"""Prefetching of images, so that attacks do not wait for decoding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from robustkit.core.shapes import Images
from robustkit.data.samples import Samples


def read_ahead(
    samples: Samples, blocks: Iterable[npt.NDArray[np.int64]]
) -> Iterator[tuple[npt.NDArray[np.int64], Images]]:
    """Yield the positions and the images of each block, in order.

    While one block is used the next one is decoded in another thread; at most three are in memory. Arrays are read
    when they are used.
    """
    if not samples.source.slow:
        yield from ((block, samples.images(block)) for block in blocks)
        return
    waiting: tuple[npt.NDArray[np.int64], Future[Images]] | None = None
    with ThreadPoolExecutor(1, "read-ahead") as thread:
        for block in blocks:
            following = block, thread.submit(samples.images, block)
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = following
        if waiting is not None:
            yield waiting[0], waiting[1].result()
