"""Nets of one architecture as one net: their weights stacked, one batched forward pass for all."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state

from robustkit.engine.model.batchnorm_folding import has_hooks
from robustkit.engine.model.instrumented_model import CountBackward, InstrumentedModel
from robustkit.models.classifier import Classifier


class StackedModels:
    """A callable from images (n B C H W), a batch for each net, to logits (n B K); it counts passes."""

    def __init__(self, models: Sequence[Classifier]) -> None:
        """Stack the weights as they are now."""
        parameters, buffers = stack_module_state(list(models))
        self._parameters = {name: tensor.detach() for name, tensor in parameters.items()}
        self._buffers = buffers
        self._base = copy.deepcopy(models[0]).to("meta")
        self.forwards = self.backwards = 0

    def __call__(self, x: Tensor) -> Tensor:
        """Return the logits (n B K) of images (n B C H W)."""
        n, rows = x.shape[:2]
        self.forwards += n * rows
        if x.requires_grad:
            x = CountBackward.apply(x.flatten(0, 1), self, 1).view_as(x)
        logits: Tensor = torch.vmap(self._one)(self._parameters, self._buffers, x)
        return logits

    def _one(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        logits: Tensor = functional_call(self._base, (parameters, buffers), (x,))
        return logits


def stacked(members: Sequence[InstrumentedModel], x: Tensor) -> StackedModels | None:
    """Return the nets as one; None if they cannot be stacked, or their logits of x (B C H W) change."""
    # A hook would be called once for all nets.
    if any(has_hooks(instrumented.model) for instrumented in members):
        return None
    try:
        whole = StackedModels([instrumented.model for instrumented in members])
        with torch.no_grad():
            joint = whole(x.expand(len(members), *x.shape))
            alone = torch.stack([instrumented.model(x) for instrumented in members])
    except (RuntimeError, ValueError, TypeError, NotImplementedError):
        return None
    if not torch.allclose(joint, alone, rtol=1e-3, atol=1e-3 * float(alone.abs().amax())):
        return None
    whole.forwards = 0
    return whole
