"""What others' code fails with: memory that was short, told apart from all else, and its words in one line."""

from __future__ import annotations

import torch

NO_MEMORY = "out of memory even with one image at a time; use a device with more memory."


def is_out_of_memory(error: Exception) -> bool:
    """Return whether smaller pieces may help."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def first_line(error: Exception) -> str:
    """Return the first line of what it says, or its name if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
