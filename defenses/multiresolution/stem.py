"""A net made to take stacks of images: its first convolution for so many times as many channels."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import nn

from robustkit.core.errors import UsageError, did_you_mean
from robustkit.core.shapes import Images
from robustkit.models.layers.features import Reached, evaluating

STEMS = ("fresh", "inflated")


def widen(net: nn.Module, image: Images, copies: int, stem: str = "fresh") -> None:
    """Let a net, in place, take `copies` images side by side; no other tensor than its first layer's changes.

    Args:
        net: any in which the first layer that runs is a convolution.
        image: (1 C H W), as the net takes it now.
        copies: images in a stack.
        stem: `fresh` draws new weights from torch's generator; `inflated` gives each image the weights as they
            are, divided by their number, so that a stack of equal images is what the image was.

    Raises:
        UsageError: for another stem, or a net without such a convolution.
    """
    if stem not in STEMS:
        raise did_you_mean("stem", stem, STEMS)
    first = _first(net, image)
    channels = image.shape[1]
    if first.in_channels != channels or first.groups != 1:
        raise UsageError(
            f"the net's first convolution takes {first.in_channels} channels in {first.groups} groups, the images "
            f"have {channels}; write a net for such images."
        )
    with torch.no_grad():
        inflated = first.weight.repeat(1, copies, *[1] * (first.weight.dim() - 2)) / copies
    first.in_channels = copies * channels
    first.weight = nn.Parameter(inflated)
    if stem == "fresh":
        first.reset_parameters()


@torch.no_grad()
def _first(net: nn.Module, image: Images) -> nn.Conv2d:
    """Return the convolution that runs first, by a pass that ends there and leaves the net as it was."""
    found: list[nn.Conv2d] = []

    def end(module: Any, args: Any) -> NoReturn:
        found.append(module)
        raise Reached(args[0])

    handles = [part.register_forward_pre_hook(end) for part in net.modules() if isinstance(part, nn.Conv2d)]
    try:
        with evaluating(net):
            net(image)
    except Reached:
        return found[0]
    finally:
        for handle in handles:
            handle.remove()
    raise UsageError("the net has no convolution to take a stack of images; write one that begins with one.")
