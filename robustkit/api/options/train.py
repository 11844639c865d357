"""Options of `train`."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustkit.api.options import texts
from robustkit.api.options.declare import about, option
from robustkit.api.options.shared import (
    DATA_FORM,
    IMAGES,
    LABELS,
    Deterministic,
    Device,
    JsonFlag,
    RunFolder,
    Seed,
    TrustCode,
)
from robustkit.core.limits import Limits

if TYPE_CHECKING:
    from robustkit.data.samples import Samples
    from robustkit.training.method import Method
    from robustkit.training.progress import TrainProgress

DEFAULT_DATA = "digits:train"


@dataclass(frozen=True, kw_only=True)
class TrainCompute(Deterministic, Device, section="Compute"):
    """How the method is computed."""

    precision: str = option(
        "auto", "auto, fp32 or bf16.", more="auto is bf16 on a GPU that supports it.", metavar="NAME"
    )
    devices: int = option(
        1,
        "Devices of this machine, with one process each; under torchrun or srun, their setting counts.",
        Limits(1, 1024),
        metavar="N",
    )
    parallel: str = option(
        "data",
        "What processes share: data (each batch), or members (of methods whose members are independent).",
        metavar="WHAT",
    )


@dataclass(frozen=True, kw_only=True)
class TrainOptions(RunFolder, TrainCompute, TrustCode, Seed, section="Training"):
    """Options of `robustkit.train` and `robustkit train`."""

    arch: str | None = option(
        None,
        "The net; ARCH@WEIGHTS or a run folder sets the initial weights, for each member its own.",
        expected="a model string such as ./net.py:factory, so that the run can be loaded again",
        metavar="MODEL",
        shown_default="by the data",
    )
    limit: int | None = option(None, "Use only the first N images.", Limits(1), metavar="N")
    epochs: int | None = option(
        None,
        "Passes over the data.",
        Limits(1),
        metavar="N",
        shown_default="by the method and the number of images",
    )
    batch_size: int | None = option(
        None,
        "Images in a step, over all devices.",
        Limits(1),
        metavar="N",
        shown_default="auto, by the method",
        read=texts.number_or_auto,
    )
    lr: float | None = option(
        None, "Largest learning rate.", Limits(0, open="low"), metavar="RATE", shown_default="by the method"
    )
    members: int | None = option(
        None, "Nets trained side by side.", Limits(1, 1024), metavar="N", shown_default="by the method"
    )
    ema: float = option(
        0.0,
        "Decay of a moving average of the weights, e.g. 0.999, which is stored instead of the last weights.",
        Limits(0, 1, open="high"),
        metavar="DECAY",
    )
    augment: str | None = option(None, "none, crop or crop-flip.", metavar="NAME", shown_default="by the data")


@dataclass(frozen=True)
class TrainArguments(TrainOptions):
    """The arguments of `robustkit.train`."""

    method: str | Method = field(
        metadata=about("One of robustkit list methods, with its fields, e.g. csgld(cycles=3).")
    )
    data: str | Samples | Any = option(DEFAULT_DATA, f"A data string, or: {IMAGES[0].lower()}{IMAGES[1:]}")
    labels: Any = option(None, LABELS)
    _: KW_ONLY
    test: str | Samples | None = option(
        None, "Data to evaluate the result on; by default the test split that belongs to a named training split."
    )
    progress: TrainProgress | None = option(None, "Receives the events of the run, to display them.")


@dataclass(frozen=True, kw_only=True)
class TrainFlags(JsonFlag, TrainOptions, section="Input"):
    """Train nets, or samples of a posterior. The same command resumes; the folder is a model string.

    Each method has flags of its own: robustkit train METHOD --help.
    """

    examples = (
        "robustkit train standard",
        "robustkit train csgld --arch robustkit:cifar-resnet20 --data train.npz --test test.npz --cycles 5",
    )

    data: str = option(DEFAULT_DATA, DATA_FORM, metavar="DATA")
    test: str | None = option(
        None, "Evaluate the result on this data.", metavar="DATA", shown_default="the data's test split"
    )
    data_root: Path | None = option(
        None, "Folder of downloaded data sets.", metavar="DIR", shown_default="~/.cache/robustkit/data"
    )
    download: bool = option(False, "Download the data set if it is absent.")
