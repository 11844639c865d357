"""A copy of a net whose weights are converted once, which autocast and convolutions would do in each pass.

Autocast stays on, and operations that it does not cast compute as before: the logits are those of the net itself
under autocast.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from robustkit.engine.model.batchnorm_folding import has_hooks
from robustkit.models.classifier import Classifier
from robustkit.models.ensembles.mixture import Samples

# Layers all of whose operations autocast runs in low precision.
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (*CONVOLUTIONS, nn.Linear, nn.MultiheadAttention)
PLANAR = (nn.Conv2d, nn.ConvTranspose2d)


def with_converted_weights(
    model: Classifier, dtype: torch.dtype | None, layout: torch.memory_format, max_bytes: float
) -> Classifier | None:
    """Return a copy whose layers have weights of this type and memory layout.

    Args:
        model: with weights in float32; it is not changed.
        dtype: what autocast casts to; None leaves the type.
        layout: of the weights of two-dimensional convolutions.
        max_bytes: the most memory for the copy.

    Returns:
        The copy. None if there is nothing to convert, if it does not fit, or if the net cannot be copied: hooks
        may refer to the net itself, and a posterior replaces its net's weights between passes.
    """
    net = model.net
    if (
        not isinstance(net, nn.Module)
        or has_hooks(net)
        or any(isinstance(part, Samples) for part in net.modules())
    ):
        return None
    if not any(_is_converted(part, dtype, layout) for part in net.modules()):
        return None
    if sum(tensor.nbytes for tensor in (*net.parameters(), *net.buffers())) > max_bytes:
        return None
    try:
        copied = copy.deepcopy(net)
        for part in copied.modules():
            if _is_converted(part, dtype, layout):
                part.to(dtype=dtype)
                if isinstance(part, PLANAR):
                    part.to(memory_format=layout)
    except Exception:  # whatever the code of a user's net raises when it is copied
        return None
    return model.with_net(copied.requires_grad_(False))


def _is_converted(part: nn.Module, dtype: torch.dtype | None, layout: torch.memory_format) -> bool:
    kinds = LAYERS if dtype is not None else PLANAR if layout != torch.contiguous_format else ()
    # Autocast leaves float64 as it is.
    return isinstance(part, kinds) and all(weight.dtype == torch.float32 for weight in part.parameters())


def module_state(net: object) -> list[Any]:
    """Return values that differ between two calls if a pass changed the net: tensors by identity and version.

    A copy of a net that changes itself would not follow the net.
    """
    return [
        (id(part), name, *_value(value))
        for part in (net.modules() if isinstance(net, nn.Module) else ())
        for values in (part._parameters, part._buffers, vars(part))
        for name, value in values.items()
    ]


def _value(value: object) -> tuple[object, ...]:
    if isinstance(value, Tensor):
        return id(value), None if value.is_inference() else value._version
    if isinstance(value, (int, float, str)):
        return (value,)
    return id(value), len(value) if isinstance(value, (list, dict, set)) else None
