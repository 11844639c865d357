"""Features of layers, and images made to have those of others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robustkit.core.errors import UsageError
from robustkit.models.layers.features import distil


class Stopping(nn.Module):
    """Passes images on without their gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


@pytest.mark.parametrize("trained", [True, False])
def test_a_layer_without_a_gradient_is_refused(trained: bool) -> None:
    net = nn.Sequential(Stopping(), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 3 * 5, 6))
    net.requires_grad_(trained)
    x = torch.rand(2, 3, 5, 7)
    with pytest.raises(UsageError, match="layer 1 has no gradient with respect to the image"):
        distil(net, x, x.flip(0), 1, eps=0.1, step_size=0.1, steps=2)
