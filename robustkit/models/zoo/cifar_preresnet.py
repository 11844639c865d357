"""Pre-activation ResNets for CIFAR (He et al. 2016, arXiv:1603.05027), with parameter-free shortcuts.

Blocks are of two convolutions at every depth; some implementations take bottlenecks from 44 layers on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from robustkit.core.shapes import Images, Logits


class PreActBasic(nn.Module):
    """Batch norm and ReLU before each of two 3x3 convolutions; the shortcut subsamples and pads with zeros."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.stride = stride
        self.pad = (outside - inside) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return features with `outside` channels."""
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        shortcut = x
        # A padding by nothing is a copy, forward and backward.
        if self.stride > 1 or self.pad:
            shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        total: torch.Tensor = out + shortcut
        return total


class CifarPreResNet(nn.Module):
    """The net with 6n + 2 layers: three groups of n blocks with 16, 32 and 64 channels, and a last batch norm."""

    def __init__(self, *, depth: int, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.layer1 = _group(16, 16, blocks, stride=1)
        self.layer2 = _group(16, 32, blocks, stride=2)
        self.layer3 = _group(32, 64, blocks, stride=2)
        self.bn = nn.BatchNorm2d(64)
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Images) -> Logits:
        """Return the logits of images of any height and width."""
        out = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        logits: torch.Tensor = self.linear(F.relu(self.bn(out)).mean((2, 3)))
        return logits


def _group(inside: int, outside: int, blocks: int, stride: int) -> nn.Sequential:
    first = PreActBasic(inside, outside, stride)
    return nn.Sequential(first, *(PreActBasic(outside, outside, 1) for _ in range(blocks - 1)))
