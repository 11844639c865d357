"""Nets of our own: `robustkit:NAME`."""

from __future__ import annotations

from functools import partial
from importlib import import_module, resources
from pathlib import Path
from typing import TYPE_CHECKING

from robustkit.core.preprocess import Preprocess
from robustkit.models.sources.built import Built
from robustkit.models.sources.source import ModelSource
from robustkit.models.zoo.catalog import ZOO, lookup

if TYPE_CHECKING:
    from robustkit.models.options import Options
    from robustkit.models.strings import ModelString
    from robustkit.models.weights.files import WeightsFile


def own_weights(spec: ModelString) -> WeightsFile | None:
    """Return the trained weights that the package brings for a net of the zoo; None where it brings none."""
    entry = lookup(spec.name)
    if entry.weights is None:
        return None
    from robustkit.models.weights.files import read_weights

    with resources.as_file(resources.files("robustkit") / "weights" / entry.weights) as path:
        return read_weights(Path(path))


def build(spec: ModelString, options: Options, weights: WeightsFile | None) -> Built:
    """Return a net of the zoo with the classes and channels of the query, else of the weights, else its own.

    Raises:
        UsageError: The zoo has no such net.
    """
    import torch

    from robustkit.models.weights.fitting import sizes_in

    entry = lookup(spec.name)
    channels, height, width = entry.input
    module, _, factory = entry.factory.partition(":")
    make = partial(getattr(import_module(module), factory), **entry.kwargs)
    num_classes, in_channels = options.num_classes, options.in_channels
    if weights is not None:
        with torch.device("meta"):
            net = make(num_classes=entry.num_classes, in_channels=channels)
        found = sizes_in(weights, net, options.weights)
        num_classes, in_channels = num_classes or found[0], in_channels or found[1]
    sizes = {"num_classes": num_classes or entry.num_classes, "in_channels": in_channels or channels}
    return Built(
        net=make(**sizes),
        arch=spec.arch,
        identity={"arch": spec.arch, **entry.kwargs, **sizes},
        num_classes=sizes["num_classes"],
        in_channels=sizes["in_channels"],
        preprocess=Preprocess((height, width), resize=min(height, width)),
    )


SOURCE = ModelSource(
    prefix="robustkit",
    help="a net of robustkit's own",
    build=build,
    fields=frozenset({"num_classes", "in_channels", "pretrained"}),
    own_weights=own_weights,
    nets=ZOO,
    facts=lookup,
    names=lambda: ZOO,
)
