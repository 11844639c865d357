"""A small net of the VGG kind (Simonyan and Zisserman 2015, arXiv:1409.1556) for CIFAR: no shortcuts anywhere.

Batch norm follows every convolution and one average over the image the last, where the paper has neither.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from robustkit.core.shapes import Images, Logits


class CifarVGG(nn.Module):
    """Pairs of 3x3 convolutions with 32, 64 and 128 channels, halved in between by the largest of four."""

    def __init__(self, *, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.layer1 = _pair(in_channels, 32)
        self.layer2 = _pair(32, 64)
        self.layer3 = _pair(64, 128)
        self.linear = nn.Linear(128, num_classes)

    def forward(self, x: Images) -> Logits:
        """Return the logits of images of any height and width."""
        out = F.max_pool2d(self.layer1(x), 2, ceil_mode=True)
        out = F.max_pool2d(self.layer2(out), 2, ceil_mode=True)
        logits: torch.Tensor = self.linear(self.layer3(out).mean((2, 3)))
        return logits


def _pair(inside: int, outside: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inside, outside):
        convolution = nn.Conv2d(channels, outside, 3, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(outside), nn.ReLU()]
    return nn.Sequential(*layers)
