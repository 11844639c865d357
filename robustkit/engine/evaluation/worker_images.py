"""The images that a worker has: sent by the driver, or read from files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch

from robustkit.core.errors import RunError, UsageError
from robustkit.core.flags import Flag
from robustkit.core.shapes import Images
from robustkit.data.samples import Samples, Source
from robustkit.engine.evaluation.tasks import Data


class WorkerImages:
    """A `Source` of the images that a worker has: sent by the driver, or read from files while others are in use.

    Images with a verdict are not kept.
    """

    slow: ClassVar[bool] = False

    def __init__(self, data: Data) -> None:
        """Keep the first images."""
        self.first = data.images
        self.kept = dict[int, np.ndarray]()
        self.blocks = dict[int, tuple[Future[Images], int]]()
        self.thread = ThreadPoolExecutor(1, "read-ahead")
        self.files: Samples | None = None
        if data.source is not None:
            self.files = Samples(data.name, data.labels, None, data.source, data.rows)

    def add(self, positions: np.ndarray, images: np.ndarray | None) -> None:
        """Keep images that were sent, or start to read them."""
        places = [place for place in positions.tolist() if place not in self.kept]
        if images is not None:
            self.kept |= dict(zip(positions.tolist(), images, strict=True))
        elif self.files is not None and places:
            block = self.thread.submit(self.files.images, places)
            self.blocks |= {place: (block, row) for row, place in enumerate(places)}

    def close(self) -> None:
        """Read no more files."""
        self.thread.shutdown(wait=False, cancel_futures=True)

    def remove(self, position: int) -> None:
        """Do not keep an image any longer."""
        self.kept.pop(position, None)
        self.blocks.pop(position, None)

    def read(self, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        """Return those images, (B C H W)."""
        found = [self._image(row) for row in rows.tolist()]
        return torch.from_numpy(np.stack(found) if found else self.first[:0].copy())

    def _image(self, row: int) -> np.ndarray:
        if row in self.blocks:
            block, place = self.blocks[row]
            image: np.ndarray = block.result()[place].numpy()
            return image
        return self.kept[row] if row in self.kept else self.first[row]

    def content(self, rows: npt.NDArray[np.int64]) -> Iterator[bytes]:
        """Yield the images' bytes."""
        yield from (image.numpy().tobytes() for image in self.read(rows))

    def flags(self, rows: npt.NDArray[np.int64]) -> tuple[Flag, ...]:
        """Return nothing: the driver checks the data."""
        return ()


def readable(source: Source | None, rows: np.ndarray) -> bool:
    """Return whether the files of a source are here, as the first one shows."""
    try:
        return source is not None and bool(next(iter(source.content(rows[:1])), None) is not None)
    except (OSError, UsageError, RunError):
        return False


def content_hash(source: Source, rows: np.ndarray) -> str:
    """Return the sha256 of what these images are read from."""
    digest = hashlib.sha256()
    for part in source.content(rows):
        digest.update(part)
    return digest.hexdigest()
