"""Small nets for tests, and a way to import them by model string."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import nn


class Flat(nn.Module):
    """A linear classifier of images of any channel count, its weights from a seed, not from global generators."""

    def __init__(self, size: int = 64, classes: int = 10, scale: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        self.linear = nn.Linear(size, classes)
        generator = torch.Generator().manual_seed(classes + 100 * seed)
        with torch.no_grad():
            self.linear.weight.copy_(torch.randn(classes, size, generator=generator) * scale)
            self.linear.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.flatten(1) - 0.5)


def flat(pixels: int = 64, seed: int = 0) -> nn.Module:
    """Return a `Flat` net; the factory for model strings."""
    return Flat(pixels, seed=seed)


class Small(nn.Module):
    """Two convolutions; smooth enough for attacks to work, small enough for tests."""

    def __init__(self, channels: int = 3, classes: int = 10, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = nn.Sequential(
                nn.Conv2d(channels, 8, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(8, 8, 3, padding=1, stride=2),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(2),
                nn.Flatten(),
                nn.Linear(32, classes),
            ).eval()
            for parameter in self.parameters():
                parameter.data.mul_(3)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(4 * (x - 0.5))


def small(channels: int = 3, classes: int = 10, seed: int = 0) -> nn.Module:
    """Return a `Small` net; the factory for model strings."""
    return Small(channels, classes, seed)


class Faulty(Small):
    """A small net with a fault chosen by name."""

    def __init__(self, fault: str, channels: int = 1, classes: int = 10) -> None:
        super().__init__(channels, classes)
        self.fault = fault

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = super().forward(x)
        if self.fault == "nan-some":
            return torch.where((x.mean((1, 2, 3)) > 0.3)[:, None], torch.nan, logits)
        if self.fault == "inf":
            return logits / 0
        if self.fault == "one-class":
            return logits[:, :1]
        if self.fault == "flat":
            return logits[:, 0]
        if self.fault == "text":
            return "logits"  # type: ignore[return-value]
        if self.fault == "raises":
            raise ValueError("this net has a bug")
        if self.fault == "random":
            return logits + torch.randn_like(logits)
        if self.fault == "probabilities":
            return logits.softmax(1)
        if self.fault == "detached":
            return logits.detach()
        if self.fault == "dynamic":
            with torch.enable_grad():
                point = x.detach().requires_grad_()
                torch.autograd.grad(super().forward(point).sum(), point)
            return logits
        return logits


def faulty(fault: str, channels: int = 1, classes: int = 10) -> nn.Module:
    """Return a `Faulty` net; the factory for model strings."""
    return Faulty(fault, channels, classes)


class Wrapped(nn.Module):
    """The built-in net with a mask that misleads evaluations, chosen by name."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        from robustkit import load_model

        self.fault = fault
        self.net = load_model("robustkit:digits-cnn")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return FAULTS[self.fault](self.net, x)


FAULTS = {
    "none": lambda net, x: net(x),
    "softmax": lambda net, x: net(x).softmax(1),
    "log-softmax": lambda net, x: net(x).log_softmax(1),
    "cold": lambda net, x: 1e6 * net(x),
    "rounded-input": lambda net, x: net((8 * x).round() / 8),
    "rounded-logits": lambda net, x: net(x).round(),
    "detached": lambda net, x: net(x).detach(),
    "straight-through": lambda net, x: net(x + ((4 * x).round() / 4 - x).detach()),
    "flipped-gradient": lambda net, x: net(2 * x.detach() - x),
    "root": lambda net, x: net(x.sqrt() ** 2),
    "torch-noise": lambda net, x: net(x + 0.1 * torch.randn_like(x)),
    "numpy-noise": lambda net, x: net(x + 0.1 * torch.from_numpy(np.random.randn(*x.shape)).float()),
    "random-noise": lambda net, x: net(x + 0.1 * random.random()),
    "batch-mean": lambda net, x: net(x) - net(x).mean(0),
    "dynamic": lambda net, x: net(x + 0 * _gradient(net, x)),
    "two-classes": lambda net, x: net(x)[:, :2],
    "one-off": lambda net, x: net(x).roll(1, 1),
}


def _gradient(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        return torch.autograd.grad(net(point).sum(), point)[0]


def wrapped(fault: str) -> nn.Module:
    """Return the built-in net with a fault; the factory for model strings."""
    return Wrapped(fault)


def labelled(net: nn.Module, n: int, shape: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random images and the net's own predictions of them, so that it is right on all."""
    x = torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return x, net(x).argmax(1)
