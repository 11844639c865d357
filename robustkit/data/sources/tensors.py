"""The user's tensors as numpy arrays."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch

from robustkit.core.errors import UsageError


def as_array(tensor: torch.Tensor, name: str) -> npt.NDArray[Any]:
    """Return the numbers of a tensor, which shares its memory where possible; floats of any kind as float32.

    Raises:
        UsageError: it is sparse or quantised, or has no numbers (device `meta`); `name` is its name in errors.
    """
    try:
        there = tensor.detach().cpu()
        # numpy has no bfloat16
        return (there.float() if there.is_floating_point() else there).numpy()
    except (NotImplementedError, RuntimeError, TypeError) as error:
        raise UsageError(
            f"{name}: a tensor of layout {tensor.layout} on the device {tensor.device} cannot be read; "
            "pass a dense one that holds its numbers."
        ) from error
