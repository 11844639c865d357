"""Samples with a corruption: computed when they are read, or read from the files of a ready-made set."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from robustkit.core.errors import UsageError, did_you_mean, error_summary
from robustkit.core.flags import Flag
from robustkit.data.corruptions.names import NAMES, SEVERITIES
from robustkit.data.corruptions.table import corrupt
from robustkit.data.request import DataRequest
from robustkit.data.samples import Samples, Source
from robustkit.data.sources.arrays import ArraySource, check_form

LABELS = "labels.npy"


@dataclass(frozen=True, eq=False)
class CorruptedSource:
    """Images of another source, corrupted when they are read; random numbers depend on an image's pixels alone."""

    clean: Source
    name: str
    severity: int
    slow: ClassVar[bool] = True

    def read(self, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        """Return those images, float32 (B, C, H, W)."""
        x = self.clean.read(rows)
        ids = [int.from_bytes(hashlib.sha256(image.tobytes()).digest()[:4], "little") for image in x.numpy()]
        return corrupt(x, self.name, self.severity, torch.tensor(ids, dtype=torch.int64))

    def content(self, rows: npt.NDArray[np.int64]) -> Iterator[bytes]:
        """Yield the corruption and the bytes of the clean images."""
        yield f"{self.name}@{self.severity}".encode()
        yield from self.clean.content(rows)

    def flags(self, rows: npt.NDArray[np.int64]) -> tuple[Flag, ...]:
        """Return the flags of the clean images."""
        return self.clean.flags(rows)

    def enlargement(self, row: int) -> float:
        """Return by which factor an image file is enlarged when it is read; 1 for arrays."""
        factor = getattr(self.clean, "enlargement", None)
        return 1.0 if factor is None else float(factor(row))


@dataclass(frozen=True, eq=False)
class CorruptedFiles:
    """A folder of a file for each corruption, with the images of the five severities one after the other.

    It has no images itself; `corrupted` chooses a file and a severity.
    """

    folder: Path
    n: int
    slow: ClassVar[bool] = False

    def chosen(self, name: str, severity: int) -> ArraySource:
        """Return the images of one corruption and severity; UsageError if their file is absent or invalid."""
        path = self.folder / f"{name}.npy"
        images = _array(path)
        if len(images) != self.n * len(SEVERITIES):
            raise UsageError(
                f"{path} has {len(images)} images, but {self.n} labels need {self.n * len(SEVERITIES)}, five "
                "severities one after the other."
            )
        check_form(images.shape, images.dtype, str(path))
        return ArraySource(images[self.n * (severity - 1) : self.n * severity], channels_last=True)

    def read(self, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        """Raise UsageError: no corruption has been chosen."""
        raise UsageError(
            f"{self.folder} has no clean images; add ?corruption=NAME@1 to 5, e.g. ?corruption=fog@3."
        )

    def content(self, rows: npt.NDArray[np.int64]) -> Iterator[bytes]:
        """Yield the names of the corruptions in the folder, and the bytes of their images at all severities."""
        for name in NAMES:
            if (self.folder / f"{name}.npy").is_file():
                yield name.encode()
                for severity in SEVERITIES:
                    yield from self.chosen(name, severity).content(rows)

    def flags(self, rows: npt.NDArray[np.int64]) -> tuple[Flag, ...]:
        """Return nothing: arrays have no image files."""
        return ()


def _array(path: Path) -> npt.NDArray[Any]:
    try:
        array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}; write a folder of CIFAR-10-C's .npy files.") from None
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"{path} cannot be read ({error_summary(error)}); is it a .npy file?") from error
    return array


def load(request: DataRequest) -> Samples:
    """Return the samples of a folder such as CIFAR-10-C: labels.npy, and NAME.npy for each corruption."""
    labels = np.asarray(_array(request.path / LABELS))
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) == 0:
        raise UsageError(
            f"{request.path / LABELS} must hold whole numbers (N), got {labels.dtype} {labels.shape}."
        )
    n, rest = divmod(len(labels), len(SEVERITIES))
    repeated = rest == 0 and n > 0 and bool((labels.reshape(len(SEVERITIES), n) == labels[:n]).all())
    labels = labels[:n] if repeated else labels
    numbers = labels.astype(np.int64)
    rows = np.arange(len(numbers), dtype=np.int64)
    return Samples(request.name, numbers, None, CorruptedFiles(request.path, len(numbers)), rows)


def corrupted(samples: Samples, name: str, severity: int) -> Samples:
    """Return the same samples with corrupted images.

    Args:
        samples: clean ones, or those of a ready-made folder.
        name: of the corruption.
        severity: from 1 to 5.

    Raises:
        UsageError: the corruption or severity does not exist.
    """
    if name not in NAMES:
        raise did_you_mean("corruption", name, NAMES)
    if severity not in SEVERITIES:
        raise UsageError(f"corruption {name!r} has no severity {severity}; write {name}@1 to {name}@5.")
    if isinstance(samples.source, CorruptedFiles):
        return replace(samples, source=samples.source.chosen(name, severity))
    return replace(samples, source=CorruptedSource(samples.source, name, severity))


def parse(text: str) -> tuple[str, int]:
    """Return name and severity of `NAME@SEVERITY`; UsageError if the text is not that."""
    name, _, severity = text.partition("@")
    if severity not in {str(number) for number in SEVERITIES}:
        raise UsageError(f"corruption={text} has no severity from 1 to 5; write e.g. corruption=fog@3.")
    return name, int(severity)
