"""Modules that act on each number alone and whose slope there says little of where they lead: found, and mended.

Signs, steep sigmoids, quantisers, whatever they are written with: their gradient is taken for the mean of secants
as wide as their arguments spread, which only needs calling them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.gradient_views.smooth_rules import WIDTH, spread
from robustkit.gradient_views.straight_through import through

# Half the widths of the secants, in smearing widths: together they have a peak and long tails.
REACH = (0.5, 1.0, 2.0, 4.0, 8.0)
# A slope this parallel to the secants' is left alone.
LIKE = 0.9


def bent(module: nn.Module, x: Tensor, out: Tensor) -> bool:
    """Return whether a module that made `out` of x is to be mended."""
    if not x.is_floating_point() or x.shape != out.shape or x.dim() < 2 or any(True for _ in module.parameters()):
        return False
    x = x.detach()
    half = torch.arange(x[0].numel(), device=x.device).view(x.shape[1:]) % 2 == 0
    with torch.no_grad():
        if not torch.equal(module.forward(x), out.detach()):
            return False
        moved = module.forward(x + half * WIDTH * spread(x))
        if not torch.equal(moved[:, ~half], out.detach()[:, ~half]):
            return False
    with torch.enable_grad():
        at = x.clone().requires_grad_()
        again = module.forward(at)
        slope = torch.autograd.grad(again.sum(), at)[0] if again.requires_grad else torch.zeros_like(x)
    wide = secants(module, x).flatten(1)
    like = F.cosine_similarity(slope.flatten(1).nan_to_num(0, 0, 0), wide, eps=1e-30)
    return bool((like < LIKE).float().mean() > 0.5) and bool(wide.any())


def mended(module: nn.Module, x: Tensor, out: Tensor) -> Tensor:
    """Return what the module made of x with the gradient of secants."""
    return through(out, x * secants(module, x))


@torch.no_grad()
def secants(module: nn.Module, x: Tensor) -> Tensor:
    """Return the mean slope of a module between points on either side of x."""
    x = x.detach()
    steps = [reach * WIDTH * spread(x) for reach in REACH]
    slopes = [(module.forward(x + step) - module.forward(x - step)) / (2 * step) for step in steps]
    return torch.stack(slopes).mean(0)
