"""Linear probes on the layers of a net, and the features of these layers from one pass.

A probe is a batch norm and a linear layer on the whole feature map of a layer, as in arXiv:2408.05446, or on its
spatial mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from robustkit.core.errors import UsageError
from robustkit.core.shapes import Images
from robustkit.models.layers.features import check_layer, evaluating

# Number of probes if no layers are named, and the share of the layers before the first: the published probes
# are on 7 of 53 layers, from the 20th on.
DEFAULT_PROBES, SHARE_BEFORE = 7, 0.4


def layer_outputs(net: nn.Module, x: Images, layers: Sequence[str]) -> tuple[list[Tensor], Any]:
    """Return the outputs of the named modules in order, and the output of the net, from one pass of images x."""
    parts, outputs = dict(net.named_modules()), {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            outputs[name] = output

        return hook

    handles = [parts[name].register_forward_hook(keep(name)) for name in layers]
    try:
        output = net(x)
    finally:
        for handle in handles:
            handle.remove()
    for name in layers:
        if not isinstance(outputs.get(name), Tensor):
            raise UsageError(
                f"layer {name!r} returns no tensor in the forward pass of the net; name another layer."
            )
    return [outputs[name] for name in layers], output


def flat(features: Tensor, pooled: bool) -> Tensor:
    """Return the features (B D) of a layer: all, or pooled over positions (B C H W) or tokens (B T C)."""
    if pooled and features.dim() == 4:
        return features.mean((2, 3))
    if pooled and features.dim() == 3:
        return features.mean(1)
    return features.flatten(1)


@torch.no_grad()
def default_layers(net: nn.Module, image: Images) -> tuple[str, ...]:
    """Return the names of the layers that have probes by default: at most seven, evenly spaced.

    Layers are the modules that run one after another, such as the blocks of a residual net or a transformer.
    Layers without spatial dimensions, such as pooled features, have no probes.
    """
    order: list[str] = []
    shapes: dict[str, int] = {}

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and name not in shapes:
                order.append(name)
                shapes[name] = output.dim()

        return hook

    handles = [part.register_forward_hook(record(name)) for name, part in _units(net, "")]
    try:
        with evaluating(net):
            net(image)
    finally:
        for handle in handles:
            handle.remove()
    known = [name for name in order if shapes[name] > 2]
    if len(known) > DEFAULT_PROBES:
        late = known[int(SHARE_BEFORE * len(known)) :]
        count = min(DEFAULT_PROBES, len(late))
        known = [late[(index + 1) * len(late) // count - 1] for index in range(count)]
    if not known:
        raise UsageError("the net has no layer with feature maps for a probe; set --layers.")
    return tuple(known)


def _units(net: nn.Module, prefix: str) -> list[tuple[str, nn.Module]]:
    units: list[tuple[str, nn.Module]] = []
    parts = list(net.named_children())
    for name, part in parts:
        # A module that only wraps another one is skipped.
        if isinstance(part, (nn.Sequential, nn.ModuleList)) or (len(parts) == 1 and any(part.children())):
            units += _units(part, f"{prefix}{name}.")
        else:
            units.append((f"{prefix}{name}", part))
    return units


def probes(net: nn.Module, image: Images, layers: Sequence[str], pooled: bool) -> nn.ModuleList:
    """Return a new probe for each layer.

    Args:
        net: the net.
        image: one image (1 C H W); a pass of it gives the width of each layer and the number of classes.
        layers: names of modules.
        pooled: whether probes get the spatial mean of a feature map.

    Raises:
        UsageError: if the net has no such layer, or does not run it, or returns no logits.
    """
    for name in layers:
        check_layer(net, name, 0)
    with evaluating(net), torch.no_grad():
        features, logits = layer_outputs(net, image, layers)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise UsageError(
            f"a {type(net).__name__} returns no logits (B, K), which probes are trained with; use another net."
        )
    classes = logits.shape[1]
    widths = [flat(each, pooled).shape[1] for each in features]
    return nn.ModuleList(nn.Sequential(nn.BatchNorm1d(width), nn.Linear(width, classes)) for width in widths)
