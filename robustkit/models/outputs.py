"""What nets return: logits, somewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch


def logits_in(output: object) -> torch.Tensor | None:
    """Return the logits in whatever a net returned: those called so, else the first tensor."""
    if isinstance(output, torch.Tensor):
        return output
    values: Iterable[object]
    if isinstance(output, Mapping):
        named, values = output.get("logits"), output.values()
    else:
        named = getattr(output, "logits", None)
        values = output if isinstance(output, (tuple, list)) else getattr(output, "__dict__", {}).values()
    return next((value for value in (named, *values) if isinstance(value, torch.Tensor)), None)
