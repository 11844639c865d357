"""Models of many forms, all of them the same function of images 1x8x8 or 3x8x8."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 8


class Viewing(nn.Module):
    """A small net that uses `view` on its images and features, as many do, which needs the standard layout."""

    def __init__(self, channels: int = 1, classes: int = 10, side: int = SIDE) -> None:
        super().__init__()
        self.side = side
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(channels)
            self.conv = nn.Conv2d(channels, 4, 3, padding=1)
            self.linear = nn.Linear(4 * side * side, classes)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.view(x.size(0), -1).mean(1)
        x = F.relu(self.conv(x))
        return self.linear(x.view(x.size(0), -1)) + mean[:, None]


def viewing(channels: int = 1, side: int = SIDE) -> nn.Module:
    """Return a `Viewing` net; the factory for model strings."""
    return Viewing(channels, side=side).eval()


class Shaped(nn.Module):
    """A net with a calling convention chosen by name."""

    def __init__(self, how: str, channels: int = 1) -> None:
        super().__init__()
        self.net, self.how = viewing(channels), how
        self.rows: Tensor | None = None
        if how in ("half", "bfloat16", "double"):
            self.net.to(getattr(torch, how))

    def forward(self, x: Tensor) -> Any:
        return HABITS[self.how](self, x)


def _autocast(model: Shaped, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model.net(x)


def _batch_of(size: int) -> Callable[[Shaped, Tensor], Tensor]:
    def answer(model: Shaped, x: Tensor) -> Tensor:
        assert len(x) == size
        return model.net(x)

    return answer


def _remembers_rows(model: Shaped, x: Tensor) -> Tensor:
    if model.rows is None:
        model.rows = x.new_zeros(len(x), 1)
    assert len(model.rows) == len(x), "other rows than at first"
    return model.net(x) + model.rows


def _by_numpy(model: Shaped, x: Tensor) -> Any:
    return model.net(torch.from_numpy(x.numpy())).numpy()


class NoBackward(torch.autograd.Function):
    """The identity without a backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise NotImplementedError("no backward pass")


HABITS: dict[str, Callable[[Shaped, Tensor], Any]] = {
    **dict.fromkeys(("half", "bfloat16", "double", "plain"), lambda model, x: model.net(x)),
    "subtracts-in-place": lambda model, x: model.net(x.sub_(0.0)),
    "relu-in-place": lambda model, x: model.net(F.relu_(x)),
    "batch-of-5": _batch_of(5),
    "batch-of-1": _batch_of(1),
    "remembers-rows": _remembers_rows,
    "autocast": _autocast,
    "float16-answers": lambda model, x: {"logits": model.net(x).half()},
    "by-numpy": _by_numpy,
    "in-a-dict-of-arrays": lambda model, x: {"logits": _by_numpy(model, x)},
    "detached": lambda model, x: model.net(x.detach()) + model.net.linear.bias * 0,
    "inference": torch.inference_mode()(lambda model, x: model.net(x)),
    "no-backward": lambda model, x: model.net(NoBackward.apply(x)),
}
# Those that have no gradient.
BLIND = ("by-numpy", "in-a-dict-of-arrays", "detached", "inference", "no-backward")


def shaped(how: str, channels: int = 1) -> nn.Module:
    """Return a `Shaped` net; the factory for model strings."""
    return Shaped(how, channels).eval()


def as_function(how: str) -> Callable[[Tensor], Any]:
    """Return a function that reaches a net whose parameters require gradients."""
    net = shaped(how)
    return lambda x: net(x)


def on_arrays(x: np.ndarray) -> np.ndarray:
    """Return the logits of a numpy array."""
    assert isinstance(x, np.ndarray)
    with torch.no_grad():
        return viewing()(torch.from_numpy(x)).numpy()


def of_torch(how: str) -> nn.Module:
    """Return the net as torch's own tools leave it."""
    net = viewing()
    images = torch.rand(4, 1, SIDE, SIDE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if how == "exported":
            return torch.export.export(net, (images,), dynamic_shapes=({0: torch.export.Dim("rows")},)).module()
        if how == "exported-for-4":
            return torch.export.export(net, (images,)).module()
        if how == "inside-exported":
            return nn.Sequential(nn.Identity(), torch.export.export(net, (images,)).module())
        traced = torch.jit.trace(net, images)
        return torch.jit.freeze(traced) if how == "frozen" else traced


class Breaking(nn.Module):
    """A net whose code fails as chosen by name."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.net, self.how = viewing(), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "key":
            return {"logits": self.net(x)}["size"]
        if self.how == "attribute":
            return self.shape_of_things(x)
        if self.how == "assertion":
            assert x.min() > 2, "pixels of that size"
        if self.how == "silent":
            assert x.min() > 2
        if self.how == "recursion":
            return self(x)
        if self.how == "stop":
            next(iter([]))
        if self.how == "two-lines":
            raise RuntimeError("the first line\nthe second one")
        return self.net(x, x)


def breaking(how: str) -> nn.Module:
    """Return a `Breaking` net; the factory for model strings."""
    return Breaking(how).eval()
