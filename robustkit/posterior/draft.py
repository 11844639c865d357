"""Posterior samples during training: one file each, and one file for all at the end."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from robustkit.core.errors import RunError
from robustkit.core.writing import refuse_link, subfolder
from robustkit.posterior.digest import digest
from robustkit.posterior.store import (
    DELTA,
    EXACT,
    FILE,
    FORMAT,
    MEAN,
    SCALE,
    Posterior,
    encode_difference,
    is_coded,
)
from robustkit.posterior.stream import TensorEntry, write

FOLDER = "samples"


class UnfinishedPosterior:
    """The samples of an unfinished training run, in the folder `samples` of the run.

    Files are written atomically. A resumed run overwrites the samples that it had written after its last
    checkpoint with the same content.
    """

    def __init__(self, run: Path) -> None:
        """Use the folder of a run, which may be new."""
        self.run = Path(run)

    def __len__(self) -> int:
        """The number of samples from the first one without a gap."""
        count = 0
        while self._file(count).is_file():
            count += 1
        return count

    def add(self, state: Mapping[str, Tensor], number: int | None = None) -> int:
        """Write a sample and return its number.

        Args:
            state: a net's `state_dict()`.
            number: number of the sample, from 0; by default the next.

        Raises:
            RunError: if a weight is NaN or infinite.
        """
        number = len(self) if number is None else number
        for name, tensor in state.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise RunError(
                    f"sample {number} has NaN or infinite values in {name!r}: the training has diverged; "
                    "train with a smaller learning rate."
                )
        subfolder(self.run, FOLDER)
        entries = [_whole(name, tensor) for name, tensor in state.items()]
        write(self._file(number), entries, {"sha256": _digest(state)})
        return number

    def state(self, number: int) -> dict[str, Tensor]:
        """Return a sample as it was written; RunError if its file is missing or has changed."""
        path = self._file(number)
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                recorded = (file.metadata() or {}).get("sha256")
        except (safetensors.SafetensorError, OSError) as error:
            raise RunError(f"{path} cannot be read ({error}); train again with --overwrite.") from error
        if _digest(tensors) != recorded:
            raise RunError(f"{path} has changed since it was written; train again with --overwrite.")
        return tensors

    def require(self, count: int) -> None:
        """Raise RunError if there are fewer than `count` samples."""
        if len(self) < count:
            raise RunError(f"{self.run} lacks some of {count} states; train again with --overwrite.")

    def check(self, count: int) -> None:
        """Raise RunError unless the first `count` samples are unchanged."""
        self.require(count)
        for number in range(count):
            self.state(number)

    def keep(self, count: int) -> None:
        """Remove all samples but the first `count`, as when a run resumes from an earlier step."""
        refuse_link(self.run / FOLDER)
        while self._file(count).is_file():
            self._file(count).unlink()
            count += 1

    def pack(self) -> Posterior:
        """Write one file of all samples, remove the single files, and return the posterior.

        It can be called again after a crash at any point.

        Raises:
            RunError: if there are no samples, or two have different tensors.
        """
        if not (self.run / FILE).is_file():
            self._write()
        shutil.rmtree(self.run / FOLDER, ignore_errors=True)
        return Posterior.open(self.run)

    def _file(self, number: int) -> Path:
        return self.run / FOLDER / f"{number:04d}.safetensors"

    def _write(self) -> None:
        count = len(self)
        if not count:
            raise RunError(f"{self.run} has no posterior sample to pack: the method kept none.")
        self.check(count)
        files: list[Any] = [safetensors.safe_open(self._file(number), framework="pt") for number in range(count)]
        names = sorted(files[0].keys())
        for number, file in enumerate(files):
            if _shapes(file) != _shapes(files[0]):
                raise RunError(f"sample {number} in {self.run / FOLDER} has other tensors than sample 0.")
        entries = [entry for name in names for entry in _Stack(name, files).entries()]
        write(self.run / FILE, entries, {"format": FORMAT, "samples": str(count)})


class _Stack:
    """One tensor of all samples. Every pass reads it again, with the tensor of one sample in memory at a time."""

    def __init__(self, name: str, files: Sequence[Any]) -> None:
        self.name, self.files = name, files
        first = files[0].get_tensor(name)
        self.dtype, self.shape = first.dtype, tuple(first.shape)

    def entries(self) -> list[TensorEntry]:
        count = len(self.files)
        if not is_coded(self.dtype, self.shape):
            return [TensorEntry(EXACT + self.name, self.dtype, (count, *self.shape), self._rows)]
        return [
            TensorEntry(MEAN + self.name, torch.float32, self.shape, lambda: [self._mean()]),
            TensorEntry(SCALE + self.name, torch.float32, (count,), lambda: (scale for scale, _ in self._coded())),
            TensorEntry(DELTA + self.name, torch.float16, (count, *self.shape), self._codes),
        ]

    def _codes(self) -> Iterator[Tensor]:
        return (code for _, code in self._coded())

    def _rows(self) -> Iterator[Tensor]:
        return (file.get_tensor(self.name) for file in self.files)

    def _mean(self) -> Tensor:
        total = torch.zeros(self.shape, dtype=torch.float64)
        for row in self._rows():
            total += row
        return (total / len(self.files)).float()

    def _coded(self) -> Iterator[tuple[Tensor, Tensor]]:
        mean = self._mean()
        return (encode_difference(row - mean) for row in self._rows())


def _digest(state: Mapping[str, Tensor]) -> str:
    return digest({name: state[name] for name in sorted(state)})


def _whole(name: str, tensor: Tensor) -> TensorEntry:
    return TensorEntry(name, tensor.dtype, tuple(tensor.shape), lambda: [tensor])


def _shapes(file: Any) -> dict[str, tuple[str, list[int]]]:
    slices = {name: file.get_slice(name) for name in file.keys()}
    return {name: (view.get_dtype(), view.get_shape()) for name, view in slices.items()}
