"""Nets of torchvision: `torchvision:NAME`."""

from __future__ import annotations

import difflib
import os
from typing import TYPE_CHECKING, Any

from robustkit.core.errors import UsageError
from robustkit.core.preprocess import Preprocess
from robustkit.models.sources.built import Built
from robustkit.models.sources.network import quiet, reachable
from robustkit.models.sources.source import ModelSource

if TYPE_CHECKING:
    from robustkit.models.options import Options
    from robustkit.models.strings import ModelString
    from robustkit.models.weights.files import WeightsFile


def build(spec: ModelString, options: Options, weights: WeightsFile | None) -> Built:
    """Return a net of torchvision, with its pretrained weights unless a file or `pretrained=false` is given.

    Raises:
        UsageError: torchvision has no such net, or its weights have other classes or could not be downloaded.
    """
    from torchvision import models

    from robustkit.models.weights.fitting import sizes_in

    names = models.list_models(module=models)
    if spec.name not in names:
        near = difflib.get_close_matches(spec.name, names, n=1)
        hint = f"did you mean 'torchvision:{near[0]}'?" if near else "torchvision.models.list_models() names them."
        raise UsageError(f"torchvision has no model {spec.name!r}: {hint}")
    record = models.get_model_weights(spec.name).DEFAULT
    classes = len(record.meta["categories"])
    pretrained = options.pretrained and weights is None
    if pretrained and options.num_classes not in (None, classes):
        raise UsageError(
            f"torchvision's weights for {spec.name!r} have {classes} classes, not {options.num_classes}: "
            f"give a file as {spec.arch}@FILE.safetensors, or write pretrained=false beside num_classes."
        )
    num_classes = options.num_classes or classes
    net = _create(spec, record if pretrained else None, num_classes)
    if weights is not None and options.num_classes is None:
        found, _ = sizes_in(weights, net, options.weights)
        if found is not None:
            num_classes, net = found, _create(spec, None, found)
    transforms = record.transforms()
    return Built(
        net=net,
        arch=spec.arch,
        identity={"arch": spec.arch, "num_classes": num_classes},
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        num_classes=num_classes,
        preprocess=_preprocess(transforms),
        class_names=tuple(record.meta["categories"]) if pretrained else None,
    )


def _create(spec: ModelString, record: Any, num_classes: int) -> Any:
    from torchvision import models

    refused = UsageError(
        f"torchvision's weights for {spec.name!r} could not be downloaded: give a file as "
        f"{spec.arch}@FILE.safetensors, or write {spec.arch}?pretrained=false for an untrained net."
    )
    with quiet():
        if record is not None and not _cached(record.url) and not reachable(record.url):
            raise refused
        try:
            return models.get_model(spec.name, weights=record, num_classes=num_classes)
        # torch.hub reports a broken download as RuntimeError (wrong hash) or as one of many OSErrors.
        except (OSError, RuntimeError) as error:
            raise refused from error


def _cached(url: str) -> bool:
    import torch

    return os.path.exists(os.path.join(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2]))


def _preprocess(transforms: Any) -> Preprocess:
    (crop,), (resize,) = transforms.crop_size, transforms.resize_size
    return Preprocess((crop, crop), resize, transforms.interpolation.value)


SOURCE = ModelSource(
    prefix="torchvision",
    help="any torchvision classifier, likewise",
    build=build,
    fields=frozenset({"num_classes", "pretrained"}),
)
