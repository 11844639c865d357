"""Indexed samples: labels in memory, images read when they are used."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from robustkit.core.errors import UsageError
from robustkit.core.flags import Flag
from robustkit.core.shapes import Images

# Values outside [0, 1] by less are rounding errors.
_ROUNDING = 1e-5


@runtime_checkable
class Source(Protocol):
    """Where the images of a set are read from; rows are numbered in the source's own order.

    `slow` is whether reading takes so long that prefetching is worth it (`robustkit.data.prefetch`).
    """

    slow: ClassVar[bool]

    def read(self, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        """Return the images of these rows, float32 (B, C, H, W), contiguous, newly allocated."""
        ...

    def content(self, rows: npt.NDArray[np.int64]) -> Iterator[bytes]:
        """Yield the bytes that determine these images, for the fingerprint."""
        ...

    def flags(self, rows: npt.NDArray[np.int64]) -> tuple[Flag, ...]:
        """Return reasons to doubt results on these images."""
        ...


@dataclass(frozen=True, eq=False)
class Samples:
    """A sequence of labelled images, read lazily.

    Attributes:
        name: the canonical data string; file paths are absolute.
        labels: int64 (N,), in [0, K).
        classes: the names of the classes, if known.
        source: where the images are read from.
        rows: int64 (N,), the row of the source at each position.
        by_name: whether labels are positions in the sorted names of the classes, not given numbers.
        fixed: whether `?classes=` has assigned the classes.
        listed: whether it did so by a list of names, whose positions are the model's numbers.
        notes: what was left out or changed, each as a sentence without its full stop.
        label_flags: doubts about the labels.
    """

    name: str
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...] | None
    source: Source
    rows: npt.NDArray[np.int64]
    by_name: bool = False
    fixed: bool = False
    listed: bool = False
    notes: tuple[str, ...] = ()
    label_flags: tuple[Flag, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """The number of classes: of named ones, or else the largest label plus 1."""
        return len(self.classes) if self.classes else int(self.labels.max(initial=-1)) + 1

    def images(self, positions: Sequence[int] | npt.NDArray[Any]) -> Images:
        """Return the images at these positions, in this order.

        Args:
            positions: integers (B,) from 0 to N - 1.

        Returns:
            float32 (B, C, H, W), contiguous, in [0, 1].

        Raises:
            UsageError: a position does not exist, a file cannot be read, or an image is not in [0, 1].
        """
        wanted = np.asarray(positions, dtype=np.int64)
        outside = wanted[(wanted < 0) | (wanted >= len(self))]
        if outside.size:
            raise UsageError(
                f"{self.name}: there is no position {outside[0]}; write one from 0 to {len(self) - 1}."
            )
        x = self.source.read(self.rows[wanted])
        self._refuse_outside_box(x, wanted)
        return x

    def enlargements(self, most: int) -> list[float]:
        """Return by which factors image files are enlarged when they are read.

        Args:
            most: the largest number of files, evenly spaced over the samples.

        Returns:
            A factor for each of the files; arrays have none.
        """
        enlargement = getattr(self.source, "enlargement", None)
        if enlargement is None:
            return []
        places = np.unique(np.linspace(0, len(self) - 1, min(most, len(self))).astype(np.int64))
        return [enlargement(int(row)) for row in self.rows[places]]

    def head(self, n: int | None) -> Samples:
        """Return the first n samples, all of them for None.

        Raises:
            UsageError: n is smaller than 1 or larger than the number of samples.
        """
        if n is None:
            return self
        if not 1 <= n <= len(self):
            raise UsageError(f"{self.name}: cannot take {n} of {len(self)} samples; write 1 to {len(self)}.")
        return self.pick(np.arange(n))

    def pick(self, positions: npt.NDArray[np.int64]) -> Samples:
        """Return the samples at these positions, in this order."""
        return replace(self, labels=self.labels[positions], rows=self.rows[positions])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of labels and image contents; file locations do not count."""
        digest = hashlib.sha256(self.labels.astype("<i8").tobytes())
        for part in self.source.content(self.rows):
            digest.update(part)
        return digest.hexdigest()

    @cached_property
    def flags(self) -> tuple[Flag, ...]:
        """Reasons to doubt results on these samples: of their labels, and of their image files."""
        return (*self.label_flags, *self.source.flags(self.rows))

    def _refuse_outside_box(self, x: torch.Tensor, positions: npt.NDArray[np.int64]) -> None:
        if x.numel() == 0:
            return
        low, high = (float(bound) for bound in x.aminmax())
        if 0 <= low and high <= 1:  # false for NaN, which aminmax propagates
            return
        bad = int((~((x >= 0) & (x <= 1)).flatten(1).all(1)).nonzero()[0])
        image = x[bad]
        if not bool(image.isfinite().all()):
            found = "holds NaN or infinite values"
        elif low >= -_ROUNDING and high <= 1 + _ROUNDING:
            raise UsageError(
                f"{self.name}: the image at position {positions[bad]} has values from {low:.9g} to {high:.9g}, "
                "outside [0, 1] by rounding; clip them, as with x.clamp(0, 1)."
            )
        else:
            found = f"has values from {float(image.min()):.6g} to {float(image.max()):.6g}"
        raise UsageError(
            f"{self.name}: the image at position {positions[bad]} {found}; "
            "write values in [0, 1], without normalisation, which belongs in the model, or uint8."
        )
