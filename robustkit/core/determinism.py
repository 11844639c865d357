"""Deterministic kernels: the same numbers from the same operation on the same device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from robustkit.core.devices import ComputeDevice
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


@contextmanager
def deterministic_operations(wanted: bool, device: torch.device) -> Iterator[None]:
    """Use deterministic kernels for all operations inside if `wanted`.

    torch raises an error for an operation that has none on the device.

    Raises:
        UsageError: CUDA has started without the setting that its matrix products need.
    """
    if not wanted:
        yield
        return
    if not ComputeDevice(device).is_cpu and os.environ.get(_WORKSPACE) not in _WORKSPACES:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            raise UsageError(
                f"deterministic kernels need the environment variable {_WORKSPACE}={_WORKSPACES[0]}; set it "
                "before Python starts."
            )
        os.environ[_WORKSPACE] = _WORKSPACES[0]
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with deterministic_convolutions():
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
