"""Where to compute: devices by name."""

from __future__ import annotations

import torch
from torch import nn

from robustkit.errors import UsageError


def pick_device(device: str | torch.device) -> torch.device:
    """Return the device of that name; `auto` is CUDA where there is one. UsageError if it cannot be used."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.zeros(1, device=place, dtype=torch.float64)  # distances are float64, which mps has not
    except (RuntimeError, AssertionError, NotImplementedError, TypeError):
        raise UsageError(f"device {str(device)!r} cannot be used here; write auto, cpu, cuda or cuda:1.") from None
    return place


def model_device(model: nn.Module) -> torch.device:
    """Return where a module's first parameter or buffer is; the CPU if it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")
