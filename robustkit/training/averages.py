"""Exponential moving averages of weights and running statistics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def copy_state(net: nn.Module) -> dict[str, Tensor]:
    """Return a copy of a net's state."""
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


@torch.no_grad()
def update_average(average: dict[str, Tensor], net: nn.Module, decay: float) -> None:
    """Update an exponential moving average with a net's state, in place; integers are copied from the state."""
    state = net.state_dict()
    real = [name for name, tensor in state.items() if tensor.is_floating_point()]
    torch._foreach_lerp_([average[name] for name in real], [state[name] for name in real], 1 - decay)
    for name in state.keys() - set(real):
        average[name].copy_(state[name])


@contextmanager
def averaged_weights(nets: Sequence[nn.Module], averages: Sequence[dict[str, Tensor]]) -> Iterator[None]:
    """Give nets the averages as their weights inside the context; without averages they keep their own."""
    own = [copy_state(net) for net, _ in zip(nets, averages, strict=False)]
    for net, average in zip(nets, averages, strict=False):
        net.load_state_dict(average)
    try:
        yield
    finally:
        for net, state in zip(nets, own, strict=False):
            net.load_state_dict(state)
