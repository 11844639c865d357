"""Devices by name."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import nn

from robustkit.core.errors import UsageError


def pick_device(device: str | torch.device) -> torch.device:
    """Return the device of a name; `auto` is CUDA if available. UsageError if the device cannot be used."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # The error that torch raises for a known but missing device depends on the device.
    with suppress(Exception):
        place = torch.device(device)
        # `meta` returns no number; mps has no float64, which distances need.
        torch.ones(1, device=place, dtype=torch.float64).item()
        if place.type != "cpu" or not place.index:  # torch takes cpu:99 for the CPU
            return place
    known = "auto, cpu, cuda or cuda:1" if torch.cuda.is_available() else "auto or cpu, as torch finds no GPU"
    raise UsageError(f"device {str(device)!r} cannot be used here; write {known}.")


def model_device(model: nn.Module) -> torch.device:
    """Return the device of a module's first parameter or buffer; the CPU if it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")
