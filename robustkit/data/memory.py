"""How much memory the machine has left. Imports no torch."""

from __future__ import annotations

from pathlib import Path

# What is assumed where the system does not say.
_ASSUMED = 4 << 30


def free_memory() -> int:
    """Return the bytes of main memory that are available."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return _ASSUMED
