"""The zoo as data: what `robustkit:NAME` can be. Imports no torch, so that listing it takes milliseconds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from robustkit.core.errors import UsageError, did_you_mean
from robustkit.models.sources.source import NetFacts

_HOME = "robustkit.models.zoo"
_WRN = re.compile(r"wrn-0*(\d+)-0*(\d+)", re.ASCII)
# More layers take minutes to make, more parameters 4 GB; the largest in the literature is wrn-94-16.
MAX_LAYERS, MAX_PARAMETERS = 1_000, 10**9


@dataclass(frozen=True)
class ZooEntry(NetFacts):
    """One net of the zoo.

    Attributes:
        factory: Where it is built, as `module:attribute`; called with `kwargs`, `num_classes`, `in_channels`.
        source: The paper.
        kwargs: What makes this member of its family.
        weights: File of trained weights inside the package; None where the net comes untrained.
    """

    factory: str
    source: str
    kwargs: Mapping[str, int] = field(default_factory=dict)
    weights: str | None = None


def _cifar(factory: str, description: str, source: str, **kwargs: int) -> ZooEntry:
    return ZooEntry((3, 32, 32), 10, description, f"{_HOME}.{factory}", source, kwargs)


def _wide_resnet(depth: int, width: int) -> ZooEntry:
    description = f"Wide ResNet, {depth} layers, {width} times as wide; any wrn-DEPTH-WIDTH is known"
    return _cifar("wide_resnet:WideResNet", description, "arXiv:1605.07146", depth=depth, width=width)


ZOO: Mapping[str, ZooEntry] = {
    "digits-cnn": ZooEntry(
        factory=f"{_HOME}.digits_cnn:DigitsCNN",
        input=(1, 8, 8),
        num_classes=10,
        description="three convolutions for scikit-learn's digits, adversarially trained; the default model",
        source="scripts/reproductions/train_digits.py",
        weights="digits-cnn.safetensors",
    ),
    "mnist-cnn": ZooEntry(
        factory=f"{_HOME}.mnist_cnn:MnistCNN",
        input=(1, 28, 28),
        num_classes=10,
        description="four convolutions and three linear layers for MNIST, as in TRADES",
        source="arXiv:1901.08573",
    ),
    **{
        f"cifar-resnet{depth}": _cifar(
            "cifar_resnet:CifarResNet",
            f"ResNet-{depth} for CIFAR, parameter-free shortcuts",
            "arXiv:1512.03385",
            depth=depth,
        )
        for depth in (20, 32, 44, 56)
    },
    **{
        f"cifar-preresnet{depth}": _cifar(
            "cifar_preresnet:CifarPreResNet",
            f"pre-activation ResNet-{depth} for CIFAR, parameter-free shortcuts",
            "arXiv:1603.05027",
            depth=depth,
        )
        for depth in (20, 110)
    },
    "cifar-vgg": _cifar(
        "cifar_vgg:CifarVGG", "six convolutions of the VGG kind with batch norm, no shortcuts", "arXiv:1409.1556"
    ),
    "cifar-mobilenet": _cifar(
        "cifar_mobilenet:CifarMobileNet",
        "seven inverted residual blocks of the MobileNet kind",
        "arXiv:1801.04381",
    ),
    "preact-resnet18": _cifar(
        "preact_resnet:PreActResNet18",
        "pre-activation ResNet-18 for CIFAR, as the robustness literature trains it",
        "arXiv:1603.05027",
    ),
    **{
        f"wrn-{depth}-{width}": _wide_resnet(depth, width)
        for depth, width in ((28, 10), (34, 10), (34, 20), (70, 16))
    },
}


def lookup(name: str) -> ZooEntry:
    """Return the zoo's entry of a name; any `wrn-DEPTH-WIDTH` counts as one.

    Raises:
        UsageError: The zoo has no such net.
    """
    if name in ZOO:
        return ZOO[name]
    wide = _WRN.fullmatch(name)
    if not wide:
        raise did_you_mean("robustkit model", name, ZOO)
    # By its digits first: Python refuses to read a number of thousands of them.
    digits = max(map(len, wide.groups()))
    depth, width = map(int, wide.groups()) if digits < 5 else (MAX_LAYERS + 1, 1)
    if depth > MAX_LAYERS or _wide_parameters(depth, width) > MAX_PARAMETERS:
        raise UsageError(
            f"wide ResNet {name[:30]!r} is too large: write at most {MAX_LAYERS:,} layers and "
            f"{MAX_PARAMETERS:,} parameters, as in wrn-70-16."
        )
    if depth < 10 or (depth - 4) % 6 or width < 1:
        raise UsageError(
            f"no wide ResNet {name!r}: DEPTH must be 10, 16, 22, 28 … (4 more than a multiple of 6) "
            "and WIDTH at least 1, as in wrn-28-10."
        )
    return _wide_resnet(depth, width)


def _wide_parameters(depth: int, width: int) -> int:
    """Return about how many parameters: two 3x3 convolutions in each block of three groups."""
    return (depth - 4) // 6 * 18 * sum((channels * width) ** 2 for channels in (16, 32, 64))
