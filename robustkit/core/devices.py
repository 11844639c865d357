"""Devices: by name, and what torch offers for each kind of them."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustkit.core import memory
from robustkit.core.errors import UsageError

# Accelerators with float64, which distances need; ROCm's GPUs are called cuda in torch.
ACCELERATORS = ("cuda", "xpu")


@dataclass(frozen=True)
class ComputeDevice:
    """A device with the functions that torch has for its kind; those that a CPU does not need do nothing on it.

    They are looked up in torch's module of the kind (`torch.cuda`, `torch.xpu`), since `torch.accelerator` has
    only a part of them before torch 2.9.
    """

    device: torch.device

    @property
    def is_cpu(self) -> bool:
        """Whether operations have finished when they return, and tensors are in main memory."""
        return self.device.type == "cpu"

    @property
    def has_tf32(self) -> bool:
        """Whether float32 operations can be computed in TF32."""
        return self.device.type == "cuda" and self._call("get_device_capability", (0, 0), self.device)[0] >= 8

    @property
    def has_fast_bf16(self) -> bool:
        """Whether training in bfloat16 is supported by an accelerator."""
        return not self.is_cpu and bool(self._call("is_bf16_supported", False))

    @property
    def name(self) -> str:
        """The name of the hardware; empty for a CPU."""
        return str(self._call("get_device_name", "", self.device))

    @property
    def count(self) -> int:
        """How many devices of the kind this process sees."""
        return int(self._call("device_count", 1))

    def synchronize(self) -> None:
        """Wait until the device has finished its work."""
        self._call("synchronize", None, self.device)

    def free_memory(self) -> int:
        """Return the bytes that this process can use: its share of what is free, and what torch has cached."""
        if self.is_cpu:
            return memory.free_memory()
        free = self._call("mem_get_info", (memory.DEFAULT_FREE_BYTES, 0), self.device)[0]
        cached = self._call("memory_reserved", 0, self.device) - self.allocated()
        return int(free) // memory.processes_per_device() + max(int(cached), 0)

    @property
    def is_memory_short(self) -> bool:
        """Whether less than a quarter of an accelerator's memory is free for this process."""
        total = self._call("mem_get_info", (0, 0), self.device)[1]
        return not self.is_cpu and 4 * self.free_memory() < int(total)

    def allocated(self) -> int:
        """Return the bytes of tensors on the device; 0 on a CPU."""
        return int(self._call("memory_allocated", 0, self.device))

    def most_allocated(self) -> int:
        """Return the most bytes of tensors since the start or `reset_most_allocated`; 0 on a CPU."""
        return int(self._call("max_memory_allocated", 0, self.device))

    def reset_most_allocated(self) -> None:
        """Measure `most_allocated` from now on."""
        self._call("reset_peak_memory_stats", None, self.device)

    def empty_cache(self) -> None:
        """Return blocks of memory that torch has cached, so that others can use them."""
        self._call("empty_cache", None)

    def seed(self, seed: int) -> None:
        """Seed the device's generator."""
        self._call("manual_seed", None, seed)

    def upload(self, tensor: Tensor) -> Tensor:
        """Return a tensor of main memory on this device, without waiting for the copy."""
        if self.is_cpu or tensor.device.type != "cpu":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _call(self, name: str, default: Any, *args: Any) -> Any:
        """Call a function of torch's module of this kind of device; the default on a CPU, or if there is none."""
        if self.is_cpu:
            return default
        function = getattr(torch.get_device_module(self.device.type), name, None)
        return default if function is None else function(*args)


def pick_device(device: str | torch.device) -> torch.device:
    """Return the device of a name; `auto` is a GPU if there is one. UsageError if the device cannot be used."""
    available = [kind for kind in ACCELERATORS if torch.get_device_module(kind).is_available()]
    if device == "auto":
        return torch.device(available[0] if available else "cpu")
    if str(device).partition(":")[0] == "mps" and torch.backends.mps.is_available():
        raise UsageError(f"device {str(device)!r} has no float64, in which distances are measured; write cpu.")
    # The error that torch raises for a known but missing device depends on the device.
    with suppress(Exception):
        place = torch.device(device)
        # `meta` returns no number.
        torch.ones(1, device=place, dtype=torch.float64).item()
        if place.type != "cpu" or not place.index:  # torch takes cpu:99 for the CPU
            return place
    names = "".join(f", {kind} or {kind}:1" for kind in available)
    known = f"auto, cpu{names}" if available else "auto or cpu, as torch finds no GPU"
    raise UsageError(f"device {str(device)!r} cannot be used here; write {known}.")


def model_device(model: nn.Module) -> torch.device:
    """Return the device of a module's first parameter or buffer; the CPU if it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")
