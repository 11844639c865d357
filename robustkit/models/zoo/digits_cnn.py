"""The built-in default net: three plain convolutions for scikit-learn's 8 x 8 digits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from robustkit.core.shapes import Images, Logits


class DigitsCNN(nn.Module):
    """Convolution and ReLU three times, then the average over the image; no batch norm, nothing random."""

    def __init__(self, *, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1, stride=2)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1)
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Images) -> Logits:
        """Return the logits of images of any height and width."""
        out = F.relu(self.conv1(x))
        out = F.relu(self.conv2(out))
        out = F.relu(self.conv3(out))
        logits: torch.Tensor = self.linear(out.mean((2, 3)))
        return logits
