"""Nets taken out of wrappers that change how they run, not what they compute; and nets that hold no numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from robustkit.core.errors import UsageError

Net = Callable[..., object]


def bare(net: Net) -> Net:
    """Return the net inside `torch.compile`, `DataParallel` or `DistributedDataParallel`; another as it is."""
    if isinstance(net, (DataParallel, DistributedDataParallel)):
        return bare(net.module)
    compiled = getattr(net, "_orig_mod", None)
    return bare(compiled) if isinstance(compiled, nn.Module) else net


def with_numbers(net: Net, name: str) -> Net:
    """Return a net that can be differentiated: a copy of one that was made in `torch.inference_mode()`.

    Raises:
        UsageError: if parameters or buffers have no values.
    """
    if not isinstance(net, nn.Module):
        return net
    for key, tensor in (*net.named_parameters(), *net.named_buffers()):
        if is_lazy(tensor):
            raise UsageError(f"model {name!r} has no values in {key!r} yet: call it once on some images first.")
        if tensor.is_meta:
            raise UsageError(
                f"model {name!r} is on the device 'meta', where {key!r} has no values: build it on the CPU, or "
                "load its weights with load_state_dict(..., assign=True)."
            )
        if tensor.is_inference():
            with torch.inference_mode(False):
                return copy.deepcopy(net)
    return net
