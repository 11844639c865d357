"""Features of the layers of any net, and images whose features at one layer are those of other images.

Layers are numbered from 1 in the order in which they run: layer l is the input of the l-th activation, and the
last layer is the logits. In a ResNet-20 these are the twenty layers of DVERGE (arXiv:2009.14720), sums of blocks
before their activation among them, which are the output of no module. A layer can also be a module's name.
The pass ends at that layer, and no hook stays on the net.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from robustkit.core.errors import UsageError, did_you_mean
from robustkit.core.shapes import Images

ACTIVATIONS: frozenset[Callable[..., Any]] = frozenset(
    [
        *(F.relu, F.relu6, F.leaky_relu, F.elu, F.celu, F.selu, F.gelu, F.silu, F.mish, F.prelu, F.rrelu),
        *(F.hardswish, F.hardtanh, F.softplus, F.tanh, F.sigmoid, F.hardsigmoid),
        *(torch.relu, torch.relu_, torch.tanh, torch.sigmoid, Tensor.relu, Tensor.relu_, Tensor.clamp_min),
        *(Tensor.tanh, Tensor.sigmoid),
    ]
)
TINY = 1e-12


class Reached(BaseException):
    """Raised to end a forward pass at its layer; it is not an error."""

    def __init__(self, value: Tensor) -> None:
        """Keep the features."""
        super().__init__()
        self.value = value


class _Count(TorchFunctionMode):
    """Counts activations, and ends the pass at one of them."""

    def __init__(self, end: int | None = None) -> None:
        super().__init__()
        self.end, self.seen = end, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ACTIVATIONS:
            self.seen += 1
            if self.seen == self.end:
                raise Reached(args[0] if args else kwargs["input"])
        return func(*args, **(kwargs or {}))


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Put a net into eval mode inside; restore the mode of every part afterwards."""
    modes = [(part, part.training) for part in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@torch.no_grad()
def depth(net: nn.Module, image: Images) -> int:
    """Return how many layers a net has, by a pass over one image that does not change the net."""
    with evaluating(net), _Count() as count:
        net(image)
    return int(count.seen) + 1


def features(net: nn.Module, x: Images, layer: int | str) -> Tensor:
    """Return the features (B ...) of each image at a layer."""
    try:
        if isinstance(layer, int):
            with _Count(layer):
                return net(x)  # type: ignore[no-any-return]
        return _of_module(net, x, layer)
    except Reached as reached:
        return reached.value


def check_layer(net: nn.Module, layer: int | str, layers: int) -> None:
    """Refuse a layer that a net of this many layers does not have."""
    if isinstance(layer, str):
        if not any(_is(name, layer) for name, _ in net.named_modules() if name):
            raise did_you_mean("layer", layer, _names(net))
    elif not 1 <= layer <= layers:
        raise UsageError(f"layer {layer}: the net has layers 1 to {layers}, the last of them its logits.")


def _names(net: nn.Module) -> list[str]:
    """Return the names of a net's modules, without those of its wrappers."""
    parts = list(net.children())
    while len(parts) == 1 and any(parts[0].children()):
        net, parts = parts[0], list(parts[0].children())
    return [name for name, _ in net.named_modules() if name]


def _is(name: str, wanted: str) -> bool:
    """Return whether a module has this name in the net or in a wrapper of it."""
    return name == wanted or name.endswith(f".{wanted}")


def _of_module(net: nn.Module, x: Images, name: str) -> Tensor:
    def end(module: nn.Module, args: Any, output: Tensor) -> NoReturn:
        raise Reached(output)

    part = next((part for own, part in net.named_modules() if _is(own, name)), None)
    if part is None:
        raise did_you_mean("layer", name, _names(net))
    handle = part.register_forward_hook(end)
    try:
        net(x)
    finally:
        handle.remove()
    raise UsageError(f"layer {name!r} takes no part in the net's forward pass; write another.")


def distil(
    net: nn.Module,
    source: Images,
    target: Images,
    layer: int | str,
    *,
    eps: float,
    step_size: float,
    steps: int,
    inertia: float = 0.0,
    start: Tensor | None = None,
) -> Images:
    """Return images near `source` whose features at a layer are like those of `target`; no gradient is attached.

    The target's features are computed once, while the authors' code computes them again in every step: the results
    are the same, and running statistics are updated half as often. No gradient of the weights is computed.

    Args:
        net: used in its current mode.
        source: (B C H W) in [0, 1].
        target: likewise, one for each source.
        layer: a number from 1, or a module's name.
        eps: the largest change of a pixel.
        step_size: a fraction of eps; below 0 the steps lead away from the target.
        steps: sign steps.
        inertia: the share of the sum of unit gradients that each step keeps.
        start: where to start, as numbers in [-1, 1] times eps; the source itself by default.

    Raises:
        UsageError: if the layer has no gradient with respect to the image.
    """
    with torch.no_grad():
        wanted = features(net, target, layer).float()
        low, high = (source - eps).clamp(0, 1), (source + eps).clamp(0, 1)
        x = source.clamp(0, 1) if start is None else torch.clamp(source + eps * start, low, high)

    velocity = torch.zeros_like(x)
    for _ in range(steps):
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            seen = features(net, point, layer)
            # Half the gradient of the squared error; its size is divided out below.
            weights = (seen.detach().float() - wanted).to(seen.dtype)
            gradient = (
                torch.autograd.grad(seen, point, weights, allow_unused=True)[0] if seen.requires_grad else None
            )
        if gradient is None:
            raise UsageError(
                f"layer {layer} has no gradient with respect to the image, so that no images can be made that it "
                "takes for others: use a model without the transform that stops gradients."
            )
        size = gradient.abs().flatten(1).sum(1).clamp(min=TINY).view(-1, *[1] * (x.dim() - 1))
        velocity = inertia * velocity + gradient / size
        x = torch.clamp(x - step_size * eps * velocity.sign(), low, high)
    return x.detach()
