"""A small net of the MobileNet kind (Sandler et al. 2018, arXiv:1801.04381) for CIFAR.

The stem keeps the resolution, as is usual for 32 x 32 images; widths and repeats are our own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from robustkit.core.shapes import Images, Logits

# Output channels, blocks and first stride of each group.
GROUPS = ((24, 2, 1), (32, 2, 2), (64, 3, 2))
WIDER = 4


class InvertedResidual(nn.Module):
    """Widen by a 1x1 convolution, filter each channel by a 3x3, narrow by a 1x1; the narrow ends are added."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        wide = WIDER * inside
        self.conv1 = nn.Conv2d(inside, wide, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, stride, padding=1, groups=wide, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.conv3 = nn.Conv2d(wide, outside, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outside)
        self.use_res_connect = stride == 1 and inside == outside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return features with `outside` channels."""
        out = F.relu6(self.bn1(self.conv1(x)))
        out = F.relu6(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        total: torch.Tensor = x + out if self.use_res_connect else out
        return total


class CifarMobileNet(nn.Module):
    """Seven inverted residual blocks between a 3x3 stem and a 1x1 convolution."""

    def __init__(self, *, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks, inside = [], 16
        for outside, count, stride in GROUPS:
            for number in range(count):
                blocks.append(InvertedResidual(inside, outside, 1 if number else stride))
                inside = outside
        self.blocks = nn.Sequential(*blocks)
        self.conv2 = nn.Conv2d(inside, 128, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(128)
        self.linear = nn.Linear(128, num_classes)

    def forward(self, x: Images) -> Logits:
        """Return the logits of images of any height and width."""
        out = self.blocks(F.relu6(self.bn1(self.conv1(x))))
        out = F.relu6(self.bn2(self.conv2(out)))
        logits: torch.Tensor = self.linear(out.mean((2, 3)))
        return logits
