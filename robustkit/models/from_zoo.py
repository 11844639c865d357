"""Nets of our own: `robustkit:NAME`."""

from __future__ import annotations

from importlib import import_module, resources
from pathlib import Path

from robustkit.models.built import Built
from robustkit.models.catalog import lookup
from robustkit.models.options import Options
from robustkit.models.strings import ModelString
from robustkit.models.weights import Weights, read_weights
from robustkit.preprocess import Preprocess


def own_weights(spec: ModelString) -> Weights | None:
    """Return the trained weights that the package brings for a net of the zoo; None where it brings none."""
    entry = lookup(spec.name)
    if entry.weights is None:
        return None
    with resources.as_file(resources.files("robustkit") / "weights" / entry.weights) as path:
        return read_weights(Path(path))


def build(spec: ModelString, options: Options, weights: Weights | None) -> Built:
    """Return a net of the zoo with the classes and channels of the query, else of the weights, else its own.

    Raises:
        UsageError: The zoo has no such net.
    """
    entry = lookup(spec.name)
    channels, height, width = entry.input
    num_classes = options.num_classes or _dimension(weights, entry.head, 0) or entry.num_classes
    in_channels = options.in_channels or _dimension(weights, entry.stem, 1) or channels
    module, _, factory = entry.factory.partition(":")
    kwargs = {**entry.kwargs, "num_classes": num_classes, "in_channels": in_channels}
    return Built(
        net=getattr(import_module(module), factory)(**kwargs),
        arch=spec.arch,
        identity={"arch": spec.arch, **kwargs},
        num_classes=num_classes,
        in_channels=in_channels,
        preprocess=Preprocess((height, width), resize=min(height, width)),
    )


def _dimension(weights: Weights | None, name: str, axis: int) -> int | None:
    tensor = weights.state.get(name) if weights else None
    return tensor.shape[axis] if tensor is not None and tensor.ndim > axis else None
