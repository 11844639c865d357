"""The small MNIST net of TRADES (Zhang et al. 2019, arXiv:1901.08573), with their names of the layers.

The authors set the last layer to zero before training; we leave torch's initial values, so that an untrained
net has a gradient.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from robustkit.core.shapes import Images, Logits


class MnistCNN(nn.Module):
    """Four unpadded 3x3 convolutions with two poolings, then three linear layers; images are 28 x 28."""

    def __init__(self, *, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.feature_extractor = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(in_channels, 32, 3),
                relu1=nn.ReLU(),
                conv2=nn.Conv2d(32, 32, 3),
                relu2=nn.ReLU(),
                maxpool1=nn.MaxPool2d(2),
                conv3=nn.Conv2d(32, 64, 3),
                relu3=nn.ReLU(),
                conv4=nn.Conv2d(64, 64, 3),
                relu4=nn.ReLU(),
                maxpool2=nn.MaxPool2d(2),
            )
        )
        self.classifier = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(64 * 4 * 4, 200),
                relu1=nn.ReLU(),
                drop=nn.Dropout(0.5),
                fc2=nn.Linear(200, 200),
                relu2=nn.ReLU(),
                fc3=nn.Linear(200, num_classes),
            )
        )

    def forward(self, x: Images) -> Logits:
        """Return the logits of 28 x 28 images."""
        logits: torch.Tensor = self.classifier(self.feature_extractor(x).flatten(1))
        return logits
