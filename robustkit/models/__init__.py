"""Models: from a string, or from any callable, to a classifier of images on [0, 1].

The names below are imported on first use, so that `robustkit.models.zoo.catalog` can be imported without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from robustkit.models.classifier import Classifier, as_classifier
    from robustkit.models.load import load_model

__all__ = ["Classifier", "as_classifier", "load_model"]

_HOME = {
    "Classifier": "robustkit.models.classifier",
    "as_classifier": "robustkit.models.classifier",
    "load_model": "robustkit.models.load",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
