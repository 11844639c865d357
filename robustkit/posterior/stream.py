"""Writing of safetensors files tensor by tensor, so that a file of hundreds of nets is never in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from robustkit.core.writing import replacing

# Names of types in the header, the widest first: in this order every tensor begins at a multiple of its size.
NAMES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor to be written; `rows` returns its pieces in order when it is written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    rows: Callable[[], Iterable[Tensor]]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> TensorEntry:
        """Return the entry of a tensor in memory."""
        return cls(name, tensor.dtype, tuple(tensor.shape), lambda: [tensor])

    @property
    def size(self) -> int:
        """Bytes of the whole tensor."""
        count = 1
        for length in self.shape:
            count *= length
        return count * self.dtype.itemsize


def write(path: Path, entries: Sequence[TensorEntry], metadata: Mapping[str, str]) -> None:
    """Write the tensors to a file, atomically."""
    order = list(NAMES)
    entries = sorted(entries, key=lambda entry: order.index(entry.dtype))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for entry in entries:
        offsets = [end, end + entry.size]
        header[entry.name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
        end += entry.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            for row in entry.rows():
                plain = row.detach().cpu().to(entry.dtype).contiguous().reshape(-1)
                stream.write(plain.view(torch.uint8).numpy().data)


def write_tensors(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors in memory. Equal tensors give equal bytes; safetensors' writer does not guarantee it."""
    write(path, [TensorEntry.of(name, tensor) for name, tensor in state.items()], metadata)
