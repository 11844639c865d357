"""Pre-activation ResNet-18 (He et al. 2016, arXiv:1603.05027) in the CIFAR form of the robustness literature.

Names and order of the layers are those of Rice et al. (arXiv:2002.11569): a 3x3 stem, no pooling after it,
and a last batch norm before the average.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from robustkit.core.shapes import Images, Logits


class PreActBlock(nn.Module):
    """Batch norm and ReLU before each of two convolutions; a 1x1 convolution where the shape changes."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.shortcut = (
            nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False))
            if stride != 1 or inside != outside
            else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return features with `outside` channels."""
        active = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(active)
        out = self.conv2(F.relu(self.bn2(self.conv1(active))))
        total: torch.Tensor = out + shortcut
        return total


class PreActResNet18(nn.Module):
    """Four groups of two blocks with 64, 128, 256 and 512 channels."""

    def __init__(self, *, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        self.layer1 = _group(64, 64, stride=1)
        self.layer2 = _group(64, 128, stride=2)
        self.layer3 = _group(128, 256, stride=2)
        self.layer4 = _group(256, 512, stride=2)
        self.bn = nn.BatchNorm2d(512)
        self.linear = nn.Linear(512, num_classes)

    def forward(self, x: Images) -> Logits:
        """Return the logits of images of any height and width."""
        out = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        logits: torch.Tensor = self.linear(F.relu(self.bn(out)).mean((2, 3)))
        return logits


def _group(inside: int, outside: int, stride: int) -> nn.Sequential:
    return nn.Sequential(PreActBlock(inside, outside, stride), PreActBlock(outside, outside, 1))
