"""What float32 operations compute: full precision, or TF32 on CUDA. The settings are torch's, for the process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# What torch calls full precision and TF32 where it sets all matrix products at once.
_MATMUL = {"ieee": "highest", "tf32": "high"}
# The settings of single operations, since torch 2.9, by backend.
_CUDA, _CPU = ("cudnn.conv", "cudnn.rnn", "cuda.matmul"), ("mkldnn.conv", "mkldnn.rnn", "mkldnn.matmul")
# What the innermost context has set; a context inside that sets the same has nothing to do.
_active: str | None = None


@contextmanager
def float32_operations(precision: str) -> Iterator[None]:
    """Set how float32 convolutions and matrix products are computed inside, and restore the settings afterwards.

    By default torch lets cuDNN's convolutions round to TF32, which moves logits in their third or fourth digit.

    Args:
        precision: `ieee` is float32 on every device, `tf32` is TF32 on CUDA.
    """
    global _active
    if _active == precision:
        yield
        return
    # torch has two interfaces, and reading the first one raises an error where only the second one can express the
    # settings. A model's own code may read the first one, so the second one sets only what the first one cannot.
    cudnn, matmul = _read_cudnn(), _read_matmul()
    before, outer, _active = _values(), _active, precision
    try:
        if cudnn is not None and cudnn != (precision == "tf32"):
            torch.backends.cudnn.allow_tf32 = not cudnn
        if matmul is not None and matmul != _MATMUL[precision]:
            torch.set_float32_matmul_precision(_MATMUL[precision])
        _set_values(dict.fromkeys(before.keys() & _CUDA if precision == "tf32" else before, precision))
        yield
    finally:
        if matmul is not None and matmul != _MATMUL[precision]:
            torch.set_float32_matmul_precision(matmul)
        if cudnn is not None and cudnn != (precision == "tf32"):
            torch.backends.cudnn.allow_tf32 = cudnn
        _set_values(before)
        _active = outer


def float32_settings() -> dict[str, str]:
    """Return how CUDA computes float32 convolutions and matrix products now, `ieee` or `tf32`."""
    if found := _values():
        return {"convolutions": found["cudnn.conv"], "matrix_products": found["cuda.matmul"]}
    return {
        "convolutions": "tf32" if _read_cudnn() else "ieee",
        "matrix_products": "ieee" if _read_matmul() == "highest" else "tf32",
    }


def _setting(name: str) -> Any:
    backend, operation = name.split(".")
    return getattr(getattr(torch.backends, backend), operation, None)


def _values() -> dict[str, str]:
    """Return the settings of the second interface by name; empty before torch 2.9."""
    settings = {name: _setting(name) for name in (*_CUDA, *_CPU)}
    found = {name: getattr(setting, "fp32_precision", None) for name, setting in settings.items()}
    # `none` is what nothing has been set for: full precision.
    return {name: value.replace("none", "ieee") for name, value in found.items() if value is not None}


def _set_values(values: dict[str, str]) -> None:
    """Set those of the second interface's settings that have another value."""
    now = _values()
    for name, value in values.items():
        if now[name] != value:
            _setting(name).fp32_precision = value


def _read_cudnn() -> bool | None:
    """Return whether cuDNN may use TF32; None where the first interface cannot express it."""
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:
        return None


def _read_matmul() -> str | None:
    """Return the precision of matrix products; None where the first interface cannot express it."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None
