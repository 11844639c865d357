"""Options of `craft`, `transfer`, `matrix` and `diversity`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustkit.api.options import texts
from robustkit.api.options.declare import about, option
from robustkit.api.options.shared import (
    DATA_FORM,
    DEFAULT_MODEL,
    IMAGES,
    LABELS,
    THREAT,
    Deterministic,
    Device,
    ImageFlags,
    JsonFlag,
    ProgressArgument,
    RunFolder,
    Seed,
    TrustCode,
    Workers,
)
from robustkit.core.limits import Limits

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from robustkit.core.threat import ThreatModel

    # A model string, or a function from images to logits.
    Model = str | Callable[[torch.Tensor], Any]

RUN_FOLDER = "Folder of a craft run."
TARGET = "Evaluate the images on this model too; repeat for several."


@dataclass(frozen=True, kw_only=True)
class AttackOptions(Seed, section="Attack"):
    """The attack of `craft` and `matrix`."""

    attack: str = option(
        "auto",
        "An attack with techniques, e.g. 'mi-fgsm(steps=20)+di'; see robustkit list.",
        metavar="ATTACK",
    )
    targeted: str | None = option(
        None,
        "Target class of each image: next, random or least-likely.",
        more="None aims at any class but the label.",
        metavar="CHOICE",
        shown_default="any other class",
    )


@dataclass(frozen=True, kw_only=True)
class CraftCompute(Workers, Device, section="Compute"):
    """How images are crafted."""

    batch_size: int | None = option(
        None,
        "Images crafted at once.",
        Limits(1),
        more="None lets the engine choose.",
        metavar="N",
        shown_default="auto",
        read=texts.number_or_auto,
    )


@dataclass(frozen=True, kw_only=True)
class CraftOptions(RunFolder, Deterministic, CraftCompute, TrustCode, AttackOptions, section="Attack"):
    """Options of `robustkit.craft` and `robustkit craft`."""

    combine: str = option(
        "consensus",
        "What is averaged over the surrogates: logits, probabilities, loss, gradients, or consensus (one loss "
        "of their mean standardised logits, with gradients scaled to one size).",
        metavar="WHAT",
    )
    weights: Sequence[float] | None = option(
        None,
        "Weight of each surrogate, in order.",
        metavar="W,W,…",
        shown_default="equal weights",
        read=texts.weights,
    )
    forecast: bool = option(
        False,
        "Leave out each surrogate in turn to estimate the success on models that the attack has not seen.",
        more="The result is `.forecast`.",
    )
    budgets: Sequence[int] = option(
        (),
        "Also measure the success at these gradients per image, e.g. 10,40,100,400.",
        more="The result is `.budgets`.",
        metavar="G,G,…",
        read=texts.counts("10,40,100"),
    )
    streaming: bool | None = option(
        None,
        "Keep one surrogate in memory at a time, or all of them.",
        more="None decides by the available memory.",
        flags="--streaming/--held",
        shown_default="what fits in memory",
    )
    png: str | Path | None = option(
        None, "Folder for the images as 8-bit PNG files that are within eps.", metavar="DIR"
    )


@dataclass(frozen=True)
class CraftArguments(ProgressArgument, CraftOptions):
    """The arguments of `robustkit.craft`."""

    surrogates: Model | Sequence[Model] = field(
        metadata=about(
            "Models to craft on: a model string or a callable from images (B C H W) in [0, 1] to logits (B K), or "
            "several in a list."
        )
    )
    images: Any = field(metadata=about(IMAGES))
    labels: Any = option(None, LABELS)
    threat: ThreatModel | str | float | tuple[str, float | str] | None = option(None, THREAT)
    _: KW_ONLY
    targets: Model | Sequence[Model] = option((), "Models to evaluate the images on. The result is `.targets`.")


@dataclass(frozen=True, kw_only=True)
class CraftFlags(JsonFlag, CraftOptions, ImageFlags, section="Input"):
    """Craft adversarial images on surrogates; evaluate them on models that the attack has not seen. Resumes.

    Success is over the images that a model classifies correctly. Without a surrogate: the built-in net.
    """

    examples = (
        "robustkit craft",
        "robustkit craft --surrogate timm:resnet50 --target timm:vit_base_patch16_224 --data folder:val",
    )

    surrogate: Sequence[str] = option(
        (DEFAULT_MODEL,), "Craft on this model; repeat for several.", metavar="MODEL", shown_default=DEFAULT_MODEL
    )
    target: Sequence[str] = option((), TARGET, metavar="MODEL")


@dataclass(frozen=True, kw_only=True)
class TransferFlags(JsonFlag, Device, TrustCode, section="Input"):
    """Evaluate crafted images on more models, after checking every image. Without a target: print the table."""

    examples = ("robustkit transfer runs/craft-3f9c21ab --target timm:vit_base_patch16_224",)

    folder: Path = field(metadata=about(RUN_FOLDER, metavar="DIR", positional=True))
    target: Sequence[str] = option((), TARGET, metavar="MODEL")
    data: str | None = option(None, "Where the data is now, if it has moved.", metavar="DATA")
    data_root: Path | None = option(
        None, "Folder of downloaded data sets.", metavar="DIR", shown_default="~/.cache/robustkit/data"
    )


@dataclass(frozen=True, kw_only=True)
class MatrixFlags(JsonFlag, RunFolder, CraftCompute, TrustCode, AttackOptions, ImageFlags, section="Input"):
    """Craft on each of several models and evaluate on all: table, matrix.json and a heat map. Resumes."""

    examples = (
        "robustkit matrix --models timm:resnet50,timm:vgg16 --data folder:val --limit 200 --threat linf:8/255",
    )

    models: Sequence[str] = option(
        (), "Models to craft on and to evaluate on, in one list or one flag each.", metavar="A,B,…"
    )
    target: Sequence[str] = option(
        (), "Evaluate on this model too, without crafting on it; repeat for several.", metavar="MODEL"
    )
    data: str | None = option(None, DATA_FORM, metavar="DATA")


@dataclass(frozen=True, kw_only=True)
class DiversityOptions(RunFolder, Device, TrustCode, Seed, section="Attack"):
    """Options of `robustkit.diversity` and `robustkit diversity`."""

    steps: int = option(50, "Steps of PGD on each member, each of a fifth of eps.", Limits(1), metavar="N")
    restarts: int = option(
        5,
        "Random starts; an image counts as fooled if any of them fools the member.",
        Limits(1),
        metavar="N",
    )


@dataclass(frozen=True)
class DiversityArguments(ProgressArgument, DiversityOptions):
    """The arguments of `robustkit.diversity`."""

    model: Model = field(
        metadata=about("An ensemble: the string of its run folder, or the result of load_model for it.")
    )
    images: Any = field(metadata=about(IMAGES))
    labels: Any = option(None, LABELS)
    threat: ThreatModel | str | float | tuple[str, float | str] | None = option(None, THREAT)
    _: KW_ONLY
    only: Sequence[int] | None = option(
        None,
        "Positions of the images to compare on, to compare several ensembles on the same images. Images that a "
        "member misclassifies are left out in any case.",
    )


@dataclass(frozen=True, kw_only=True)
class DiversityFlags(JsonFlag, DiversityOptions, ImageFlags, section="Input"):
    """Attack each member of an ensemble alone; show which other members it fools, and an oracle's robust accuracy.

    Only images that every member classifies correctly are used. To compare two ensembles on the same images, use
    --images-of.
    """

    examples = ("robustkit diversity runs/dverge-3f9c21ab/ --data digits:test --threat linf:0.2",)

    model: str = field(metadata=about("The run folder of an ensemble.", positional=True))
    data: str | None = option(None, DATA_FORM, metavar="DATA")
    images_of: Sequence[Path] = option(
        (), "Use only the images of another comparison; repeat for several.", metavar="DIR"
    )
