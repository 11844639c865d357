"""SHA-256 of a state, to detect damaged files before a run resumes from them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def digest(state: Any) -> str:
    """Return the SHA-256 of nested mappings and lists of tensors, numbers, strings and None, in their order."""
    total = hashlib.sha256()
    _add(total, state)
    return total.hexdigest()


def _add(total: Any, part: Any) -> None:
    if isinstance(part, Tensor):
        plain = part.detach().cpu().contiguous()
        total.update(f"{plain.dtype} {tuple(plain.shape)};".encode())
        total.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(part, Mapping):
        total.update(f"mapping {len(part)};".encode())
        for key, value in part.items():
            _add(total, key)
            _add(total, value)
    elif isinstance(part, list | tuple):
        total.update(f"list {len(part)};".encode())
        for value in part:
            _add(total, value)
    else:
        total.update(f"{type(part).__name__} {part!r};".encode())
