"""Options of `corrupt`. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustkit.api.options import texts
from robustkit.api.options.declare import about, option
from robustkit.api.options.shared import (
    BUILT_IN_DATA,
    DATA_FORM,
    DEFAULT_MODEL,
    IMAGES,
    LABELS,
    JsonFlag,
    ModelDevice,
    ProgressArgument,
    RunFolder,
    Seed,
    TrustCode,
)
from robustkit.core.limits import Limits

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class CorruptOptions(RunFolder, ModelDevice, Seed, TrustCode, section="Corruptions"):
    """Options of `robustkit.corrupt` and `robustkit corrupt`."""

    corruptions: Sequence[str] = option(
        (),
        "Corruptions to use, in one list or one flag each; all 15 by default.",
        metavar="A,B,…",
        shown_default="all",
    )
    severities: Sequence[int] = option(
        (1, 2, 3, 4, 5),
        "Severities to use, from 1 to 5.",
        metavar="N,N,…",
        shown_default="1,2,3,4,5",
        read=texts.counts("1,3,5"),
    )


@dataclass(frozen=True)
class CorruptArguments(ProgressArgument, CorruptOptions):
    """The arguments of `robustkit.corrupt`."""

    model: str | Callable[[torch.Tensor], Any] = field(
        metadata=about("A model string, or any callable from images (B C H W) in [0, 1] to logits (B K).")
    )
    images: Any = field(metadata=about(IMAGES))
    labels: Any = option(None, LABELS)


@dataclass(frozen=True, kw_only=True)
class CorruptFlags(JsonFlag, CorruptOptions, section="Input"):
    """Measure the accuracy on 15 common corruptions at 5 severities: noise, blur, weather, compression.

    The corruptions are those of CIFAR-10-C and ImageNet-C, computed from your images, or read from a folder of
    ready-made ones with --data cifar-c:FOLDER.
    """

    examples = (
        "robustkit corrupt timm:resnet50.a1_in1k --data folder:val --limit 1000",
        "robustkit corrupt timm:resnet18?num_classes=10@weights.safetensors --data cifar-c:CIFAR-10-C",
    )

    model: str = option(DEFAULT_MODEL, "A model string.", metavar="MODEL", positional=True)
    data: str | None = option(None, DATA_FORM, metavar="DATA", shown_default=BUILT_IN_DATA)
    limit: int | None = option(None, "Use only the first N images.", Limits(1), metavar="N")
    data_root: Path | None = option(
        None, "Folder of downloaded data sets.", metavar="DIR", shown_default="~/.cache/robustkit/data"
    )
    download: bool = option(False, "Download the data set if it is absent.")
