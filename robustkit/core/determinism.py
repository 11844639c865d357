"""Deterministic kernels: the same numbers from the same operation on the same device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from robustkit.core.errors import UsageError

_WORKSPACE, _WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")


@contextmanager
def deterministic_convolutions() -> Iterator[None]:
    """Use cuDNN's deterministic algorithms, without trying several, inside."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    if before == (True, False):
        yield
        return
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


def prepare_deterministic(wanted: bool) -> None:
    """Set what CUDA's matrix products need to be deterministic, which CUDA reads when it starts, if `wanted`."""
    if wanted and not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        os.environ.setdefault(_WORKSPACE, _WORKSPACES[0])


@contextmanager
def deterministic_operations(wanted: bool, device: torch.device) -> Iterator[None]:
    """Use deterministic kernels for all operations inside if `wanted`.

    torch raises an error for an operation that has none on the device.

    Raises:
        UsageError: CUDA has started without what its matrix products need.
    """
    if not wanted:
        yield
        return
    prepare_deterministic(wanted)
    if device.type == "cuda" and os.environ.get(_WORKSPACE) not in _WORKSPACES:
        raise UsageError(
            f"CUDA has started without {_WORKSPACE}={_WORKSPACES[0]}, which deterministic matrix products need; "
            "set this environment variable before Python starts."
        )
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with deterministic_convolutions():
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
