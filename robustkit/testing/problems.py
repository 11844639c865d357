"""Classifiers whose nearest adversarial point is known in closed form, to check attacks on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from robustkit.core.criteria import Goal
from robustkit.core.rng import RowRng
from robustkit.core.threat import ThreatModel

# Batch, channels, height and width all differ, so that an axis mistaken for another one is an error.
SHAPE = (5, 3, 7, 9)
SIZE = 189
NORMS = ("linf", "l2", "l1")
_DUAL = {"linf": 1.0, "l2": 2.0, "l1": float("inf")}


@dataclass(frozen=True)
class Problem:
    """A model and images that it classifies correctly.

    Attributes:
        model: images (B C H W) to logits (B K).
        x: the images, in [0, 1].
        labels: (B).
        distance: for each norm, the distance of each image's nearest adversarial point.
        targets: (B) target classes, if the attack is to reach those.
    """

    model: Any
    x: Tensor
    labels: Tensor
    distance: Mapping[str, list[float]]
    targets: Tensor | None = None

    @property
    def goal(self) -> Goal:
        """What the attacker wants."""
        return Goal(self.labels, self.targets)

    def to(self, dtype: torch.dtype) -> Problem:
        """Return the same in another floating-point type."""
        return replace(self, model=self.model.to(dtype), x=self.x.to(dtype))

    def rows(self, index: Tensor) -> Problem:
        """Return the problem of some of the images."""
        targets = None if self.targets is None else self.targets[index]
        return replace(self, x=self.x[index], labels=self.labels[index], targets=targets)


class Plane(nn.Module):
    """Logits linear in the image."""

    def __init__(self, weight: Tensor) -> None:
        """Take the weights (K D)."""
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B K)."""
        # No matrix product: its rounding depends on the batch size, which would be held against the attack.
        return (100 * (x - 0.5).flatten(1)[:, None] * self.weight).sum(2)


class Sphere(nn.Module):
    """Class 0 within a sphere around grey, class 1 outside."""

    def __init__(self, square: float) -> None:
        """Take the squared radius."""
        super().__init__()
        self.square = nn.Parameter(torch.tensor(square), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B 2)."""
        inside = 50 * (self.square - (x - 0.5).flatten(1).square().sum(1))
        return torch.stack([inside, -inside], 1)


def _signs(shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    """Return numbers of size 0.9 to 1.1 and either sign, so that no coordinate is much larger than another."""
    size = 0.9 + 0.2 * torch.rand(shape, generator=draw)
    return torch.where(torch.rand(shape, generator=draw) < 0.5, -size, size)


def plane(classes: int, *, targeted: bool = False, seed: int = 0) -> Problem:
    """Return a linear problem: a margin of 0.0146 to the runner-up, 1.3 times as much to the third class."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.linalg.qr(_signs((SIZE, classes), draw).double()).Q.T
    labels = torch.arange(SHAPE[0]) % classes
    ranks = (torch.arange(classes)[None, :] - labels[:, None]) % classes
    margins = torch.tensor([0.0, 0.0146, 0.019, *[0.3] * (classes - 2)][:classes]).double()
    x = 0.5 + ((0.1 - margins[ranks]) @ weight).view(SHAPE)
    rival = (labels + (2 if targeted else 1)) % classes
    step = weight[rival] - weight[labels]
    gap = -(step * (x - 0.5).flatten(1)).sum(1)
    lengths = {norm: gap / torch.linalg.vector_norm(step, _DUAL[norm], dim=1) for norm in NORMS}
    distance = {norm: length.tolist() for norm, length in lengths.items()}
    return Problem(Plane(weight), x, labels, distance, rival if targeted else None).to(torch.float32)


def sphere(seed: int = 0) -> Problem:
    """Return images inside a sphere whose squared radius is 0.02 above theirs."""
    draw = torch.Generator().manual_seed(seed)
    z = _signs((SHAPE[0], SIZE), draw).double()
    z = 1.37 * z / z.norm(dim=1, keepdim=True)
    square, size = 1.37**2 + 0.02, z.abs()
    total, top = size.sum(1), size.amax(1)
    distance = {
        "linf": (((total**2 + SIZE * 0.02).sqrt() - total) / SIZE).tolist(),
        "l2": [square**0.5 - 1.37] * SHAPE[0],
        "l1": ((top**2 + 0.02).sqrt() - top).tolist(),
    }
    labels = torch.zeros(SHAPE[0], dtype=torch.int64)
    return Problem(Sphere(square), 0.5 + z.view(SHAPE), labels, distance).to(torch.float32)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "two planes": lambda: plane(2),
    "three planes": lambda: plane(3),
    "five planes": lambda: plane(5),
    "sphere": sphere,
}


def corners(problem: Problem, norm: str) -> tuple[Problem, ThreatModel]:
    """Return the problem with images on the corners of the box, and a ball that leaves the box."""
    return (
        replace(problem, x=problem.x.gt(0.5).to(problem.x.dtype)),
        ThreatModel.parse({"linf": "linf:0.3", "l2": "l2:3", "l1": "l1:20"}[norm]),
    )


def threat_at(problem: Problem, norm: str, factor: float) -> ThreatModel:
    """Return the threat whose eps is `factor` times the largest distance of all images, below 1 the smallest."""
    edge = max(problem.distance[norm]) if factor > 1 else min(problem.distance[norm])
    return ThreatModel.parse(f"{norm}:{Fraction(factor * edge).limit_denominator(10**7)}")


def rng_of(problem: Problem, seed: int = 0, stream: str = "contract") -> RowRng:
    """Return the random numbers of the images."""
    return RowRng(seed, stream, torch.arange(10, 10 + len(problem.x)))
