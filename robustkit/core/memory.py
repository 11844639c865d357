"""Free memory of the machine and of devices. Imports torch only for a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Assumed where the system does not report its free memory: 4 GiB.
_DEFAULT_FREE_BYTES = 4 << 30


def free_memory(device: torch.device | None = None) -> int:
    """Return the free bytes of a device, of main memory for the CPU and without a device."""
    if device is not None and device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return _DEFAULT_FREE_BYTES
