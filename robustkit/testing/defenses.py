"""What every defense in front of a model must do, each check a function that raises AssertionError."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

from robustkit.core.errors import UsageError
from robustkit.core.isolation import own_randomness
from robustkit.registry import spec

CLASSES = 4
SHAPES = ((5, 3, 17, 19), (1, 1, 8, 8))


class _Pooled(nn.Module):
    """A linear classifier of images of any size and channels, which records whether its inputs are sound."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, CLASSES * 4).view(CLASSES, 4))
        self.faults: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            self.faults.append(f"a tensor of shape {tuple(x.shape)}, not images (B C H W)")
        if not x.isfinite().all():
            self.faults.append("images with NaN or infinite values")
        return nn.functional.adaptive_avg_pool2d(x, 2).mean(1).flatten(1) @ self.weight.to(x).T


def check_defense(defense: Any) -> None:
    """Check that a defense keeps the contract of defenses, in seconds.

    It is called as `defense(model, x)` with images (B C H W) in [0, 1] and returns one row of finite logits for
    each image; leaves images and model as they were; gives the same logits for the same state of the random
    generators; and its record holds what its fields are.

    Args:
        defense: an object or class under `@defense(...)`.

    Raises:
        AssertionError: if it does not keep the contract; the message says what it did.
        UsageError: if it is no defense.
    """
    defense = defense() if isinstance(defense, type) else defense
    if getattr(getattr(defense, "info", None), "kind", None) != "defense":
        raise UsageError(f"{defense!r:.80} is not registered: put @defense(...) in front of its class.")
    name = defense.info.name
    record = spec(defense)
    assert json.loads(json.dumps(record)) == record, f"{name}: its fields {record} are not kept by JSON"
    for shape in SHAPES:
        for dtype in (torch.float32, torch.float64):
            _check_call(defense, name, torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=dtype))


def _check_call(defense: Any, name: str, x: Tensor) -> None:
    model, kept = _Pooled().requires_grad_(False).eval(), x.clone()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with own_randomness("check"):
        logits = defense(model, x)
    rows, shape = len(x), tuple(x.shape)
    assert logits.shape == (rows, CLASSES), f"{name}: {rows} images of {shape} gave logits {tuple(logits.shape)}"
    assert logits.isfinite().all(), f"{name}: its logits are NaN or infinite"
    assert not model.faults, f"{name}: it gave the model {model.faults[0]}"
    assert torch.equal(x, kept), f"{name}: it changed its input in place"
    same = all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert same, f"{name}: it changed the model's tensors"
    assert not model.training, f"{name}: it put the model into train mode"
    with own_randomness("check"):
        again = defense(model, x.clone())
    assert torch.equal(again, logits), f"{name}: the same random generators gave other logits"
