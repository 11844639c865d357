"""Sizes and timing of scripts/gpu_acceptance.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from step_costs import ATTACKS
from torch import Tensor

from robustkit.core.devices import ComputeDevice
from robustkit.core.float32 import float32_operations
from robustkit.models import as_classifier
from robustkit.models.classifier import Classifier
from robustkit.models.zoo.wide_resnet import WideResNet

Row = dict[str, Any]
T = TypeVar("T")
PASS_REPEATS = 3


@dataclass(frozen=True)
class Sizes:
    """How much a section computes; by default as much as an H200 computes in its time.

    Attributes:
        wide: depth and width of the Wide ResNet with random weights.
        wide_images, net_images: images that it and the trained nets are compared on with AutoAttack.
        verdict_images: images whose verdicts are compared with those of the CPU.
        memory_batch: the largest batch whose memory is measured.
        craft_images, train_images: images to craft, and to train on for an epoch.
        steps: of craft attacks.
        pixels: height and width of random images.
        threat: of comparisons on random and CIFAR-10 images.
        arch: the net that crafts and is trained.
        autoattack, rapid: the suites that are compared with AutoAttack.
        verdict_threat, verdict_suites: of the comparison with the CPU.
        step_attacks: the attacks whose synchronisations are counted.
    """

    wide: tuple[int, int] = (28, 10)
    wide_images: int = 32
    net_images: int = 128
    verdict_images: int = 64
    memory_batch: int = 256
    craft_images: int = 512
    train_images: int = 2048
    steps: int = 10
    pixels: int = 32
    threat: str = "linf:8/255"
    arch: str = "robustkit:cifar-resnet20"
    autoattack: str = "autoattack"
    rapid: str = "rapid"
    verdict_threat: str = "linf:0.15"
    verdict_suites: tuple[str, ...] = (
        "pgd(steps=10)",
        "race",
        "apgd-t(steps=20)",
        "fab-t(steps=20)",
        "square(queries=200)",
    )
    step_attacks: tuple[str, ...] = tuple(ATTACKS)


FULL = Sizes()
QUICK = Sizes(
    wide=(10, 1),
    wide_images=1,
    net_images=2,
    verdict_images=1,
    memory_batch=2,
    craft_images=2,
    train_images=8,
    steps=2,
    pixels=8,
    threat="linf:0.9",
    arch="robustkit:wrn-10-1",
    autoattack="autoattack:square(queries=3)",
    rapid="race(steps=2)",
    verdict_threat="linf:0.9",
    verdict_suites=("race(steps=2)",),
    step_attacks=("pgd",),
)


@dataclass(frozen=True)
class Setup:
    """What every section gets."""

    device: torch.device
    sizes: Sizes
    nets: dict[str, str]
    data: str | None

    def wide(self) -> Classifier:
        """Return a Wide ResNet with random weights, which shows what its shapes cost."""
        torch.manual_seed(0)
        depth, width = self.sizes.wide
        return as_classifier(WideResNet(depth=depth, width=width).eval()).to(self.device)

    def images(self, n: int) -> Tensor:
        """Return random images (n 3 H W) on the CPU."""
        return torch.rand(n, 3, self.sizes.pixels, self.sizes.pixels, generator=torch.Generator().manual_seed(1))

    def timed(self, work: Callable[[], T]) -> tuple[T, float]:
        """Return the result of work, and the seconds until the device has finished."""
        self.synchronize()
        begun = time.perf_counter()
        result = work()
        self.synchronize()
        return result, time.perf_counter() - begun

    def synchronize(self) -> None:
        """Wait for the device."""
        ComputeDevice(self.device).synchronize()

    def pass_seconds(self, model: Classifier, x: Tensor, *, weights: bool = False) -> tuple[float, float]:
        """Return the seconds of a forward and of a backward pass for one image, in float32 on a warm device.

        Args:
            model: on the device.
            x: images of one batch (B C H W).
            weights: whether the backward pass computes gradients of the weights as well.
        """
        x = x.to(self.device)
        wanted = [weight for weight in model.parameters() if weight.requires_grad] if weights else []

        def forward() -> tuple[Tensor, Tensor]:
            leaf = x.clone().requires_grad_()
            return model(leaf).sum(), leaf

        def both() -> None:
            loss, leaf = forward()
            torch.autograd.grad(loss, [leaf, *wanted], allow_unused=True)

        def repeat(work: Callable[[], object]) -> None:
            for _ in range(PASS_REPEATS):
                work()

        # Training leaves torch's own setting of TF32, everything else computes in full precision.
        with nullcontext() if weights else float32_operations("ieee"):
            both()
            _, first = self.timed(partial(repeat, forward))
            _, total = self.timed(partial(repeat, both))
        passes = PASS_REPEATS * len(x)
        return first / passes, max(total - first, 0.0) / passes
