"""Widening of a net's first convolution, so that the net takes stacks of images."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import nn

from robustkit.core.errors import UsageError, did_you_mean
from robustkit.core.shapes import Images
from robustkit.models.layers.features import Reached, evaluating

STEMS = ("fresh", "inflated")


def widen(net: nn.Module, image: Images, copies: int, stem: str = "fresh") -> None:
    """Change a net in place so that it takes `copies` images stacked along the channels.

    Only the weights of the first convolution change.

    Args:
        net: a net in which the first layer that runs is a convolution.
        image: one image (1 C H W) that the net takes now.
        copies: images in a stack.
        stem: `fresh` draws new weights from torch's generator; `inflated` repeats the weights for each image and
            divides them by `copies`, so that a stack of equal images gives the output of the image.

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
            f"have {channels}; use a net for such images."
        )
    with torch.no_grad():
        inflated = first.weight.repeat(1, copies, *[1] * (first.weight.dim() - 2)) / copies
    first.in_channels = copies * channels
    first.weight = nn.Parameter(inflated)
    if stem == "fresh":
        first.reset_parameters()


@torch.no_grad()
def _first(net: nn.Module, image: Images) -> nn.Conv2d:
    """Return the convolution that runs first, found by a pass that ends there; the net is not changed."""
    convolutions: list[nn.Conv2d] = []

    def end(module: Any, args: Any) -> NoReturn:
        convolutions.append(module)
        raise Reached(args[0])

    handles = [part.register_forward_pre_hook(end) for part in net.modules() if isinstance(part, nn.Conv2d)]
    try:
        with evaluating(net):
            net(image)
    except Reached:
        return convolutions[0]
    finally:
        for handle in handles:
            handle.remove()
    raise UsageError("the net has no convolution that can take a stack of images; use one that starts with one.")
