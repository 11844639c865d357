"""Labelled images from data strings and arrays. Importing this package, or its catalog, does not import torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from robustkit.data.load import load_data
    from robustkit.data.samples import Samples
    from robustkit.data.sources.arrays import from_arrays

__all__ = ["Samples", "from_arrays", "load_data"]

_MODULES = {"Samples": "samples", "from_arrays": "sources.arrays", "load_data": "load"}


def __getattr__(name: str) -> object:
    """Import the module of a public name on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
