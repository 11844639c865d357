"""Out-of-memory errors: how they are recognised, and work that is tried again with less memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from robustkit.core.devices import ComputeDevice, pick_device

T = TypeVar("T")
NO_MEMORY = "out of memory even with one image at a time; use a device with more memory."
# What allocators and kernel libraries say, in lower case.
_WORDS = (
    *("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "bad_alloc"),
    *("defaultcpuallocator", "out_of_memory", "out_of_device_memory", "out_of_host_memory", "out_of_resources"),
    *("cublas_status_alloc_failed", "cublas_status_not_initialized", "cudnn_status_alloc_failed"),
    *("cusolver_status_alloc_failed", "hiperroroutofmemory"),
    *("hipblas_status_alloc_failed", "rocblas_status_memory_error", "miopenstatusallocfailed"),
)
# cuDNN also says this where memory for the workspace of its kernels is missing.
_AMBIGUOUS = ("cudnn_status_not_supported", "unable to find an engine")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory is short, so that smaller batches may help."""
    if isinstance(error, RuntimeError):
        text = str(error).lower()
        if isinstance(error, torch.OutOfMemoryError) or any(words in text for words in _WORDS):
            return True
        return any(words in text for words in _AMBIGUOUS) and ComputeDevice(pick_device("auto")).is_memory_short
    return isinstance(error, MemoryError)


def try_in_memory(work: Callable[[], T], device: torch.device) -> T | None:
    """Return what `work` returns, which is not None; or None if memory was short.

    What the failed try had allocated is free then, and cached blocks of the device are given back.
    """
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Here the error is gone, and with it the frames of the failed try and the tensors in them.
    gc.collect()
    ComputeDevice(device).empty_cache()
    return None


def retry_in_memory(work: Callable[[], T], reduce: Callable[[], None], device: torch.device) -> T:
    """Return what `work` returns; as often as memory is short, call `reduce` and run it again.

    Args:
        work: changes nothing that a second run would change again, and does not return None.
        reduce: makes the next run need less memory, or raises RunError.
        device: where `work` computes.
    """
    while (result := try_in_memory(work, device)) is None:
        reduce()
    return result
