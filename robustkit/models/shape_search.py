"""Whether it is the shape of its images that a net fails on: decided by trying other shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from torch import nn

# Heights and widths of the field's data sets and nets, in pixels.
COMMON_SIZES = (8, 28, 32, 64, 96, 128, 160, 224, 256, 299, 384)
COMMON_CHANNELS = (1, 3, 4)

Shape = tuple[int, int, int]


def taken_instead(net: object, shape: Shape, takes: Callable[[Shape], bool]) -> Shape | None:
    """Return a shape (C, H, W) that a net takes in the place of one that it does not; None if there is none.

    Args:
        net: the net, whose first weights show its channels or pixels.
        shape: what it has failed on.
        takes: whether it takes a shape.
    """
    candidates = dict.fromkeys([*_by_weights(net, shape), *_common_shapes(shape)])
    return next((other for other in candidates if other != shape and takes(other)), None)


def _by_weights(net: object, shape: Shape) -> Iterator[Shape]:
    """Yield shapes for which the first convolution or linear layer is made."""
    layers = net.modules() if isinstance(net, nn.Module) else ()
    first = next((layer for layer in layers if isinstance(layer, (nn.Conv2d, nn.Linear))), None)
    channels, height, width = shape
    if isinstance(first, nn.Conv2d):
        yield first.in_channels, height, width
        yield from ((first.in_channels, size, size) for size in COMMON_SIZES)
    elif first is not None:
        pixels = first.in_features
        if pixels % (height * width) == 0:
            yield pixels // (height * width), height, width
        for number in (channels, *COMMON_CHANNELS):
            side = math.isqrt(pixels // number)
            if number * side**2 == pixels:
                yield number, side, side


def _common_shapes(shape: Shape) -> Iterator[Shape]:
    channels, height, width = shape
    yield from ((number, height, width) for number in COMMON_CHANNELS)
    yield from ((number, size, size) for number in (channels, *COMMON_CHANNELS) for size in COMMON_SIZES)
