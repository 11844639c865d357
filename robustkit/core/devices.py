"""Where to compute: devices by name."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import nn

from robustkit.core.errors import UsageError


def pick_device(device: str | torch.device) -> torch.device:
    """Return the device of that name; `auto` is CUDA where there is one. UsageError if it cannot be used."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # What torch raises for a device that it knows but has not depends on the device.
    with suppress(Exception):
        place = torch.device(device)
        # `meta` gives no number back; mps has no float64, which distances are in.
        torch.ones(1, device=place, dtype=torch.float64).item()
        if place.type != "cpu" or not place.index:  # torch takes cpu:99 for the CPU
            return place
    known = "auto, cpu, cuda or cuda:1" if torch.cuda.is_available() else "auto or cpu, as torch finds no GPU"
    raise UsageError(f"device {str(device)!r} cannot be used here; write {known}.")


def model_device(model: nn.Module) -> torch.device:
    """Return where a module's first parameter or buffer is; the CPU if it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")
