"""Wide ResNets (Zagoruyko and Komodakis 2016, arXiv:1605.07146), without dropout.

Names of the layers are those of the authors' PyTorch port that TRADES (arXiv:1901.08573) and its followers
publish weights for. Where a block changes its width, batch norm and ReLU come before the shortcut too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from robustkit.core.shapes import Images, Logits


class WideBlock(nn.Module):
    """Batch norm and ReLU before each of two convolutions; a 1x1 convolution where the width changes."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.convShortcut = nn.Conv2d(inside, outside, 1, stride, bias=False) if inside != outside else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return features with `outside` channels."""
        active = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        out = self.conv2(F.relu(self.bn2(self.conv1(active))))
        total: torch.Tensor = out + shortcut
        return total


class WideGroup(nn.Module):
    """Blocks of one width; the first one changes the shape."""

    def __init__(self, inside: int, outside: int, blocks: int, stride: int) -> None:
        super().__init__()
        first = WideBlock(inside, outside, stride)
        self.layer = nn.Sequential(first, *(WideBlock(outside, outside, 1) for _ in range(blocks - 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return features with `outside` channels."""
        out: torch.Tensor = self.layer(x)
        return out


class WideResNet(nn.Module):
    """The net with 6n + 4 layers: three groups of n blocks with 16, 32 and 64 times `width` channels."""

    def __init__(self, *, depth: int, width: int, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.block1 = WideGroup(16, 16 * width, blocks, stride=1)
        self.block2 = WideGroup(16 * width, 32 * width, blocks, stride=2)
        self.block3 = WideGroup(32 * width, 64 * width, blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, num_classes)

    def forward(self, x: Images) -> Logits:
        """Return the logits of images of any height and width."""
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        logits: torch.Tensor = self.fc(F.relu(self.bn1(out)).mean((2, 3)))
        return logits
