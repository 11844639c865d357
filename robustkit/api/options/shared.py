"""Options that several verbs take."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustkit.api.options.declare import Options, about, option
from robustkit.api.options.texts import number_or_auto
from robustkit.core.limits import Limits

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from robustkit.core.threat import ThreatModel
    from robustkit.engine.progress import Progress
    from robustkit.registry import Suite

# As `robustkit.registry.DEFAULT_SUITE`, whose package takes a fifth of the time of --help to import.
DEFAULT_SUITE = "auto"
DEFAULT_MODEL = "robustkit:digits-cnn"
MODEL_FORM = "ARCH[@WEIGHTS][?mean=r,g,b&std=r,g,b&size=N&num_classes=K&defense=D]"
DATA_FORM = "NAME[:SPLIT], folder:PATH, webdataset:PATH or FILE.npz."
DATA_DEFAULT = "the usual threat of the data set, as 'robustkit list data' shows"
BUILT_IN_DATA = "digits:test for the built-in model; other models need it"
LARGEST_SEED = 2**63 - 1

IMAGES = (
    "Images (N C H W), floats in [0, 1] or uint8. Or, without labels: a DataLoader, a dataset or iterator of "
    "(image, label) pairs or batches, or the result of load_data."
)
LABELS = (
    "Labels (N): whole numbers from 0 to K - 1 of any type, one-hot rows (N K), or names of classes, which are "
    "numbered in sorted order."
)
THREAT = (
    "What the attacker may do: a ThreatModel or its string such as linf:8/255 (eps in pixel units of [0, 1]), a "
    'pair ("l2", 0.5), or a number, which is an eps in linf. It may follow data that holds its labels directly.'
)


@dataclass(frozen=True)
class ModelAndImages(Options):
    """The positional arguments of Python functions about one model."""

    model: Callable[[torch.Tensor], Any] = field(
        metadata=about(
            "Any callable from images (B C H W) in [0, 1] to logits (B K). Tuples and dicts that hold the logits "
            "are understood; as_classifier says which entry they are where that is not clear. A module is put "
            "into eval mode for the run and back afterwards."
        )
    )
    images: Any = field(metadata=about(IMAGES))
    labels: Any = option(None, LABELS)
    threat: ThreatModel | str | float | tuple[str, float | str] | None = option(None, THREAT)


@dataclass(frozen=True, kw_only=True)
class ProgressArgument(Options):
    """The observer of a run, which only Python functions take."""

    progress: Progress | None = option(None, "Receives the events of the run, to display them.")


@dataclass(frozen=True, kw_only=True)
class ImageFlags(Options, section="Input"):
    """The images of a command, and what the attacker may do to them."""

    data: str | None = option(None, DATA_FORM, metavar="DATA", shown_default=BUILT_IN_DATA)
    limit: int | None = option(None, "Use only the first N images.", Limits(1), metavar="N")
    threat: str | None = option(
        None, "NORM:EPS, e.g. linf:8/255 or l2:0.5.", metavar="THREAT", shown_default=DATA_DEFAULT
    )
    data_root: Path | None = option(
        None, "Folder of downloaded data sets.", metavar="DIR", shown_default="~/.cache/robustkit/data"
    )
    download: bool = option(False, "Download the data set if it is absent.")


@dataclass(frozen=True, kw_only=True)
class TrustCode(Options, section="Input"):
    """Permission to run code that a file names."""

    trust_code: bool = option(
        False, "Also run Python code that a file names, such as the record of a run folder or a list of models."
    )


@dataclass(frozen=True, kw_only=True)
class Seed(Options, section="Compute"):
    """The seed of a run."""

    seed: int = option(0, "Seed of all random numbers.", Limits(0, LARGEST_SEED), metavar="N")


@dataclass(frozen=True, kw_only=True)
class Device(Options, section="Compute"):
    """Where a verb computes."""

    device: str | torch.device = option(
        "auto",
        "auto, cpu, cuda, cuda:1, xpu …",
        more="auto is a GPU if there is one (CUDA, ROCm or XPU).",
        metavar="DEVICE",
    )


@dataclass(frozen=True, kw_only=True)
class ModelDevice(Device):
    """Where a verb computes that leaves a model where it is."""

    device: str | torch.device = option(
        "auto",
        "auto, cpu, cuda, cuda:1, xpu …",
        more="auto is the device of the model's parameters; the model is moved to any other.",
        metavar="DEVICE",
    )


@dataclass(frozen=True, kw_only=True)
class SearchOptions(ModelDevice, Seed, section="Attack"):
    """How `evaluate` attacks, which `plan` takes too."""

    suite: Suite = option(
        DEFAULT_SUITE,
        "Attacks: the name of a suite, or a list such as 'pgd(steps=50),autoattack:square'.",
        more="Or an attack object, a function (model, x, y, eps) -> x_adv, or a list of any of these.",
        metavar="SUITE",
    )
    strictness: str | float | None = option(
        None,
        "Attack until at most this share of the images, e.g. '0.05 %', could still be fooled by AutoAttack (95 % "
        "upper bound); 0 runs every attack on every image.",
        more="For suites with several arms, such as auto and rapid. The result is report.strictness.",
        metavar="SHARE",
        shown_default="0.2 %, or one image",
    )


@dataclass(frozen=True, kw_only=True)
class SearchCompute(Options, section="Compute"):
    """How attacks are computed."""

    precision: str = option(
        "auto",
        "Precision of the attacks: auto, fp32, tf32, bf16 or fp16; verdicts are always float32.",
        more="auto lets row-wise attacks run in bf16, or in tf32 on an NVIDIA GPU, where that is faster.",
        metavar="NAME",
    )
    batch_size: int | None = option(
        None,
        "Images that an attack gets at once; reduced automatically where memory is short.",
        Limits(1),
        more="None lets the engine choose.",
        metavar="N",
        shown_default="auto",
        read=number_or_auto,
    )


@dataclass(frozen=True, kw_only=True)
class Deterministic(Options, section="Compute"):
    """The same numbers each time, also on a GPU."""

    deterministic: bool = option(
        False, "Use deterministic kernels only, so that a GPU computes the same numbers each time; it is slower."
    )


@dataclass(frozen=True, kw_only=True)
class Workers(Options, section="Compute"):
    """Processes that share the work."""

    workers: int | None = option(
        None,
        "Processes that share the work, one per GPU or per share of the cores; results do not change.",
        Limits(1, 1024),
        more="None is 1, or with ray as many as the cluster has room for. In a script, call the function under "
        '`if __name__ == "__main__":`.',
        metavar="N",
        shown_default="1",
    )
    ray: str | None = option(
        None,
        "Run the workers on a Ray cluster: auto, HOST:PORT, or local for one on this machine.",
        metavar="ADDRESS",
    )


@dataclass(frozen=True, kw_only=True)
class RunFolder(Options, section="Output"):
    """The folder of a run."""

    out: str | Path | None = option(
        None,
        "Run folder; the same call resumes there.",
        metavar="DIR",
        shown_default="runs/{verb}-ID",
    )
    overwrite: bool = option(
        False, "Remove the run in the run folder and start again; files that robustkit did not write are kept."
    )


@dataclass(frozen=True, kw_only=True)
class JsonFlag(Options, section="Output"):
    """JSON instead of text."""

    json: bool = option(False, "Print the result as JSON instead of a table.")
