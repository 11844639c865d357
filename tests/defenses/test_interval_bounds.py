"""Interval bounds hold for every image in the box, and are exact on one affine layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robustkit import load_model
from robustkit.core.errors import UsageError
from robustkit.defenses.adversarial_training.interval_bounds import bounds


class Block(nn.Module):
    """A residual block with arithmetic of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.conv(x)))
        return 0.3 - torch.add(y, -x / 2, alpha=1.5) * torch.tensor([-2.0])


def net(channels: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        *(
            nn.Conv2d(channels, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            Block(),
            nn.MaxPool2d(2),
        ),
        *(nn.ZeroPad2d(1), nn.Conv2d(4, 5, 3, stride=2), nn.LeakyReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(2)),
        *(nn.Flatten(), nn.Tanh(), nn.Linear(20, 4)),
    ]
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize("channels", [1, 3])
def test_logits_of_the_box_are_within(channels: int) -> None:
    model, x = net(channels), torch.rand(5, channels, 7, 9)
    with torch.no_grad():
        lower, upper = bounds(model, x, 0.05)
        for corner in (torch.rand_like, torch.randn_like):
            for _ in range(50):
                logits = model((x + 0.05 * (2 * corner(x) - 1).clamp(-1, 1)).clamp(0, 1))
                assert (logits >= lower - 1e-5).all()
                assert (logits <= upper + 1e-5).all()
        same = bounds(model, x, 0.0)
        torch.testing.assert_close(same[0], model(x))
        torch.testing.assert_close(same[1], model(x))


def test_bounds_are_exact_on_a_linear_net() -> None:
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), torch.full((2, 1, 3, 4), 0.5)
    lower, upper = bounds(model, x, 0.1)
    reach = 0.1 * model[1].weight.abs().sum(1)
    torch.testing.assert_close(upper, model(x) + reach)
    torch.testing.assert_close(lower, model(x) - reach)


def test_a_model_string_with_normalisation() -> None:
    model = load_model("robustkit:digits-cnn?mean=0.4&std=0.2")
    lower, upper = bounds(model, torch.rand(2, 1, 8, 8), 0.0)
    torch.testing.assert_close(lower, upper)


@pytest.mark.parametrize("layer", [nn.GELU(), nn.Softmax(1)])
def test_other_operations_are_refused(layer: nn.Module) -> None:
    with pytest.raises(UsageError, match="do not pass through"):
        bounds(nn.Sequential(nn.Flatten(), nn.Linear(12, 3), layer), torch.rand(2, 1, 3, 4), 0.1)
