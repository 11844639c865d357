"""Elementwise modules with misleading derivatives: how they are found, and their gradient by secants.

Signs, steep sigmoids and quantisers, however they are implemented, get the mean slope of secants that are as
wide as the spread of their arguments. This only needs calls of the module.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.gradient_views.smooth_rules import STEP_WIDTH, row_rms
from robustkit.gradient_views.straight_through import with_gradient_of

# Half widths of the secants, in units of STEP_WIDTH: together they have a peak and long tails.
SECANT_WIDTHS = (0.5, 1.0, 2.0, 4.0, 8.0)
# A derivative with at least this cosine to the secants' slope is kept.
MIN_COSINE = 0.9


def has_misleading_gradient(module: nn.Module, x: Tensor, out: Tensor) -> bool:
    """Return whether a module, with input x and output `out`, is elementwise and has a misleading derivative."""
    if not x.is_floating_point() or x.shape != out.shape or x.dim() < 2 or any(True for _ in module.parameters()):
        return False
    x = x.detach()
    half = torch.arange(x[0].numel(), device=x.device).view(x.shape[1:]) % 2 == 0
    with torch.no_grad():
        if not torch.equal(module.forward(x), out.detach()):
            return False
        moved = module.forward(x + half * STEP_WIDTH * row_rms(x))
        if not torch.equal(moved[:, ~half], out.detach()[:, ~half]):
            return False
    with torch.enable_grad():
        point = x.clone().requires_grad_()
        again = module.forward(point)
        slope = torch.autograd.grad(again.sum(), point)[0] if again.requires_grad else torch.zeros_like(x)
    wide = mean_secant(module, x).flatten(1)
    like = F.cosine_similarity(slope.flatten(1).nan_to_num(0, 0, 0), wide, eps=1e-30)
    return bool((like < MIN_COSINE).float().mean() > 0.5) and bool(wide.any())


def with_secant_gradient(module: nn.Module, x: Tensor, out: Tensor) -> Tensor:
    """Return the output of a module for x with the gradient of secants."""
    return with_gradient_of(out, x * mean_secant(module, x))


@torch.no_grad()
def mean_secant(module: nn.Module, x: Tensor) -> Tensor:
    """Return the mean slope of a module between points on both sides of x."""
    x = x.detach()
    steps = [reach * STEP_WIDTH * row_rms(x) for reach in SECANT_WIDTHS]
    slopes = [(module.forward(x + step) - module.forward(x - step)) / (2 * step) for step in steps]
    return torch.stack(slopes).mean(0)
