"""Free memory of the machine and of devices. Imports torch only for a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Assumed where the system does not report its free memory: 4 GiB.
DEFAULT_FREE_BYTES = 4 << 30
# How many worker processes, this one included, compute on the same device.
_processes = 1


def free_memory(device: torch.device | None = None) -> int:
    """Return the free bytes of a device, of main memory for the CPU and without a device."""
    if device is not None and device.type != "cpu":
        from robustkit.core.devices import ComputeDevice

        return ComputeDevice(device).free_memory()
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return DEFAULT_FREE_BYTES


def share_device(processes: int) -> None:
    """Count on a share of the device's free memory from now on: so many processes compute on it."""
    global _processes
    _processes = processes


def processes_per_device() -> int:
    """Return how many processes compute on the device of this one."""
    return _processes
