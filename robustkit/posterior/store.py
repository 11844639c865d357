"""The posterior of a finished training run: the mean of its samples, and the difference of each sample to it.

Matrices and kernels are stored as a float32 mean and float16 differences, with a scale for each sample that
prevents underflow and overflow: half the bytes, for a rounding error of 2**-12 of a difference. Other tensors
(biases, batch norms, integers), a hundredth of a net's bytes, are stored unchanged: rounding could make a variance
negative. The file is memory-mapped, so only the samples that are used are read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property, lru_cache
from pathlib import Path

import safetensors
import torch
from torch import Tensor, nn

from robustkit.core.errors import UsageError

FILE = "posterior.safetensors"
FORMAT = "1"
MEAN, DELTA, SCALE, EXACT = "mean/", "delta/", "scale/", "exact/"
# The largest code: half of float16's largest number, so that small differences beside large ones keep their
# digits.
MAX_CODE = 2.0**15


class Posterior:
    """Samples of the weights of one net, read when they are used."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor], count: int) -> None:
        """Store memory-mapped tensors; see `open`."""
        self.path, self._tensors, self._count = path, tensors, count
        self._means: dict[torch.device, dict[str, Tensor]] = {}

    @classmethod
    def open(cls, run: Path) -> Posterior:
        """Return the posterior in a run's folder.

        Raises:
            UsageError: if there is none, or the file is damaged or of another format.
        """
        path = Path(run) / FILE
        try:
            with safetensors.safe_open(path, framework="pt", device="cpu") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except FileNotFoundError as error:
            raise UsageError(f"there is no posterior '{path}': give a folder that a sampler wrote.") from error
        except (safetensors.SafetensorError, OSError) as error:
            raise UsageError(f"posterior '{path}' is damaged: train it again in another folder.") from error
        samples = metadata.get("samples", "")
        if metadata.get("format") != FORMAT or not samples.isdecimal():
            raise UsageError(f"posterior '{path}' has format {metadata.get('format')!r}, not {FORMAT!r}.")
        # More samples than nine digits say are in no file, and Python refuses to read thousands of digits.
        count = int(samples) if len(samples) < 10 else 0
        if not count or not _whole(tensors, count):
            raise UsageError(f"posterior '{path}' is damaged: train it again in another folder.")
        return cls(path, tensors, count)

    def __len__(self) -> int:
        """The number of samples."""
        return self._count

    def __deepcopy__(self, memo: object) -> Posterior:
        """Return itself: it is immutable, and a copy would load all samples into memory."""
        return self

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file."""
        about = self.path.stat()
        return _sha256(self.path, about.st_mtime_ns, about.st_size)

    @cached_property
    def names(self) -> list[str]:
        """Names of the net's tensors."""
        return sorted(name.partition("/")[2] for name in self._tensors if name.startswith((MEAN, EXACT)))

    def mean(self) -> dict[str, Tensor]:
        """Return the mean of the samples as a state dict; integers are those of the last sample."""
        state = {}
        for name in self.names:
            if MEAN + name in self._tensors:
                state[name] = self._tensors[MEAN + name].clone()
                continue
            rows = self._tensors[EXACT + name]
            state[name] = rows.double().mean(0).to(rows.dtype) if rows.is_floating_point() else rows[-1].clone()
        return state

    def state(self, number: int) -> dict[str, Tensor]:
        """Return a sample, from 0, as a state dict of new tensors."""
        self._check(number)
        state = {}
        for name in self.names:
            like = self._tensors.get(MEAN + name)
            out = torch.empty_like(self._tensors[EXACT + name][0] if like is None else like)
            self._fill(out, name, number)
            state[name] = out
        return state

    def put(self, net: nn.Module, number: int) -> None:
        """Load a sample into a net, in place; like loading `state`, without a copy."""
        self._check(number)
        with torch.no_grad():
            for name, tensor in net.state_dict().items():
                self._fill(tensor, name, number)

    def _fill(self, out: Tensor, name: str, number: int) -> None:
        if EXACT + name in self._tensors:
            out.copy_(self._tensors[EXACT + name][number])
        elif out.dtype == torch.float32:
            scale = float(self._tensors[SCALE + name][number])
            out.copy_(self._tensors[DELTA + name][number]).mul_(scale).add_(self._mean_on(out.device)[name])
        else:
            whole = torch.empty(out.shape, dtype=torch.float32, device=out.device)
            self._fill(whole, name, number)
            out.copy_(whole)

    def _mean_on(self, device: torch.device) -> dict[str, Tensor]:
        """Return the means on a device: memory-mapped on the CPU, copied once to others."""
        if device not in self._means:
            own = {name[len(MEAN) :]: tensor for name, tensor in self._tensors.items() if name.startswith(MEAN)}
            self._means[device] = {name: tensor.to(device) for name, tensor in own.items()}
        return self._means[device]

    def _check(self, number: int) -> None:
        if not 0 <= number < len(self):
            raise UsageError(f"'{self.path}' has no sample {number}: write a number from 0 to {len(self) - 1}.")


def _whole(tensors: Mapping[str, Tensor], count: int) -> bool:
    """Return whether all tensors have `count` samples, and all parts that reading them needs."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, shape in shapes.items():
        kind, sign, own = name.partition("/")
        like = shapes.get(MEAN + own)
        wanted = {
            MEAN: DELTA + own in shapes and SCALE + own in shapes,
            DELTA: like is not None and shape == (count, *like),
            SCALE: like is not None and shape == (count,),
            EXACT: shape[:1] == (count,),
        }
        if not wanted.get(kind + sign, False):
            return False
    return True


@lru_cache
def _sha256(path: Path, changed: int, size: int) -> str:
    """Return the hash of a file; it is read again only if its time or size changes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_coded(dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor is stored as mean and differences, not unchanged."""
    return dtype == torch.float32 and len(shape) > 1


def encode_difference(difference: Tensor) -> tuple[Tensor, Tensor]:
    """Return a scale (1) and float16 codes whose product is the rounded difference to the mean."""
    largest = difference.abs().amax() if difference.numel() else difference.new_zeros(())
    scale = largest / MAX_CODE
    code = difference / torch.where(scale > 0, scale, 1)
    return scale.reshape(1), code.half()
