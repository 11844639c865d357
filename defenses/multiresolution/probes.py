"""What layers of any net see, all in one pass, and linear probes that classify by it.

A probe is a batch norm and a linear layer on a layer's whole feature map, as in arXiv:2408.05446, or on its mean
over places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from robustkit.core.errors import UsageError
from robustkit.core.shapes import Images
from robustkit.models.layers.features import check_layer, evaluating

# Probes on a net, unless layers are named, and the share of its layers that come before them: those published are
# on 7 of 53 layers, from the 20th on.
USUAL, AHEAD = 7, 0.4


def seen(net: nn.Module, x: Images, layers: Sequence[str]) -> tuple[list[Tensor], Any]:
    """Return the outputs of modules, by name, and the net's own, from one pass; no hook stays."""
    parts, outputs = dict(net.named_modules()), {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            outputs[name] = output

        return hook

    handles = [parts[name].register_forward_hook(keep(name)) for name in layers]
    try:
        answer = net(x)
    finally:
        for handle in handles:
            handle.remove()
    for name in layers:
        if not isinstance(outputs.get(name), Tensor):
            raise UsageError(f"layer {name!r} gives no tensor in the net's forward pass; write another.")
    return [outputs[name] for name in layers], answer


def flat(features: Tensor, pooled: bool) -> Tensor:
    """Return a layer's features (B D): all, or the mean over places of maps (B C H W) and tokens (B T C)."""
    if pooled and features.dim() == 4:
        return features.mean((2, 3))
    if pooled and features.dim() == 3:
        return features.mean(1)
    return features.flatten(1)


@torch.no_grad()
def usual_layers(net: nn.Module, image: Images) -> tuple[str, ...]:
    """Return the names of the layers that probes sit on if nobody says: at most seven, evenly spaced.

    Layers are the parts of the net that run one after the other, those of sequences one by one: the blocks of a
    residual net or a transformer. What has no place any more, such as pooled features, is left to the net itself.
    """
    order: list[str] = []
    shapes: dict[str, int] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and name not in shapes:
                order.append(name)
                shapes[name] = output.dim()

        return hook

    handles = [part.register_forward_hook(note(name)) for name, part in _units(net, "")]
    try:
        with evaluating(net):
            net(image)
    finally:
        for handle in handles:
            handle.remove()
    known = [name for name in order if shapes[name] > 2]
    if len(known) > USUAL:
        late = known[int(AHEAD * len(known)) :]
        count = min(USUAL, len(late))
        known = [late[(place + 1) * len(late) // count - 1] for place in range(count)]
    if not known:
        raise UsageError("the net has no layer with feature maps to put a probe on; write --layers.")
    return tuple(known)


def _units(net: nn.Module, prefix: str) -> list[tuple[str, nn.Module]]:
    found: list[tuple[str, nn.Module]] = []
    parts = list(net.named_children())
    for name, part in parts:
        # A net that only wraps another is that one.
        if isinstance(part, (nn.Sequential, nn.ModuleList)) or (len(parts) == 1 and any(part.children())):
            found += _units(part, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", part))
    return found


def probes(net: nn.Module, image: Images, layers: Sequence[str], pooled: bool) -> nn.ModuleList:
    """Return a new probe for each layer, of the width and the classes that a pass over one image shows.

    Raises:
        UsageError: if the net has no such layer, or it takes no part in the pass, or that gives no logits.
    """
    for name in layers:
        check_layer(net, name, 0)
    with evaluating(net), torch.no_grad():
        features, logits = seen(net, image, layers)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise UsageError(
            f"a {type(net).__name__} gives no logits (B, K) for probes to stand beside; write another net."
        )
    classes = logits.shape[1]
    widths = [flat(each, pooled).shape[1] for each in features]
    return nn.ModuleList(nn.Sequential(nn.BatchNorm1d(width), nn.Linear(width, classes)) for width in widths)
