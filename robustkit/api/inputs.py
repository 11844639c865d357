"""Models, images and threats as Python callers pass them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from robustkit.core.devices import model_device, pick_device
from robustkit.core.errors import UsageError
from robustkit.core.threat import ThreatModel
from robustkit.data import from_arrays
from robustkit.data.samples import Samples
from robustkit.data.sources.loaders import from_dataset, is_dataset
from robustkit.models import as_classifier, load_model
from robustkit.models.classifier import Classifier

# A model string, or a function from images to logits.
Model = str | Callable[[torch.Tensor], Any]
Threat = ThreatModel | str | float | tuple[str, float | str]


def samples_and_threat(images: Any, labels: Any, threat: Threat | None) -> tuple[Samples, ThreatModel]:
    """Return the images with their labels, and the threat, which may be passed in the place of the labels.

    Raises:
        UsageError: there is no threat, or there are no labels.
    """
    if threat is None and isinstance(labels, str | float | ThreatModel):
        labels, threat = None, labels
    if threat is None:
        raise UsageError("no threat is given; pass e.g. threat='linf:8/255'.")
    return read_samples(images, labels), ThreatModel.of(threat)


def read_samples(images: Any, labels: Any) -> Samples:
    """Return the samples of arrays with labels, or of data that holds its labels.

    Raises:
        UsageError: there are no labels, or they are given twice.
    """
    if isinstance(images, Samples):
        return images
    if labels is not None and isinstance(images, DataLoader | Dataset):
        raise UsageError(f"a {type(images).__name__} holds its labels itself; leave the labels out.")
    if labels is None and isinstance(images, str):
        raise UsageError(f"the images are the string {images!r}; pass robustkit.load_data({images!r}).")
    if labels is None and is_dataset(images):
        return from_dataset(images)
    if labels is None:
        raise UsageError("the images have no labels; pass images and labels, a DataLoader, or a dataset of pairs.")
    return from_arrays(images, labels)


def load_or_wrap(model: Model, trust_code: bool) -> Classifier:
    """Return the classifier of a model string or of a function from images to logits."""
    return load_model(model, trust_code=trust_code) if isinstance(model, str) else as_classifier(model)


def place_of(model: Classifier, device: str | torch.device) -> torch.device:
    """Return the device to compute on, where `auto` is that of the model's parameters."""
    return model_device(model) if str(device) == "auto" else pick_device(str(device))


def model_list(models: Model | Sequence[Model]) -> Sequence[Model]:
    """Return one model or several as a list."""
    if isinstance(models, torch.nn.ModuleList):  # its base class makes it callable
        return list(models)
    if isinstance(models, str) or callable(models):
        return [models]
    if not isinstance(models, Sequence):
        raise UsageError(
            "models must be model strings, torch.nn.Modules or functions from images to logits, or a list of "
            f"them, got {type(models).__name__}."
        )
    return models
