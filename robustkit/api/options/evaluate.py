"""Options of `evaluate`, `plan` and `minimum_norm`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustkit.api.options import texts
from robustkit.api.options.declare import about, option
from robustkit.api.options.shared import (
    DATA_DEFAULT,
    DEFAULT_MODEL,
    DEFAULT_SUITE,
    IMAGES,
    LABELS,
    MODEL_FORM,
    THREAT,
    Deterministic,
    ImageFlags,
    JsonFlag,
    ModelAndImages,
    ModelDevice,
    ProgressArgument,
    RunFolder,
    SearchCompute,
    SearchOptions,
    Seed,
    TrustCode,
    Workers,
)
from robustkit.core.limits import Limits

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from robustkit.core.threat import ThreatModel
    from robustkit.registry import Suite

MODEL = "A model string, or any callable from images (B C H W) in [0, 1] to logits (B K)."


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(RunFolder, Workers, Deterministic, SearchCompute, SearchOptions, section="Attack"):
    """Options of `robustkit.evaluate` and `robustkit evaluate`."""

    curve: bool = option(
        False,
        "Also search for the smallest eps that fools the model on each image.",
        more="The result is report.curve.",
    )
    audit: int = option(
        0,
        "Also run full AutoAttack on N randomly drawn images that all attacks failed on.",
        Limits(0),
        more="The result is report.audit.",
        metavar="N",
    )
    time_limit: float | None = option(
        None,
        "Stop after this time and report on the finished images; images are then attacked in random order.",
        Limits(0, open="low"),
        more="In seconds.",
        metavar="90s|10m|2h",
        read=texts.seconds,
    )
    stop_at_width: float | None = option(
        None,
        "Stop once the 95 % interval of the robust accuracy is at most this wide, e.g. 0.02.",
        Limits(0, 1, open="both"),
        metavar="SHARE",
    )


@dataclass(frozen=True)
class EvaluateArguments(ProgressArgument, EvaluateOptions, ModelAndImages):
    """The arguments of `robustkit.evaluate`."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOutput(JsonFlag, section="Output"):
    """What `robustkit evaluate` does with the result."""

    no_html: bool = option(False, "Do not write report.html into the run folder.")
    fail_under: float | None = option(
        None,
        "Exit with code 1 if the robust accuracy is lower, e.g. 0.45.",
        Limits(0, 1),
        expected="a share from 0 to 1, e.g. 0.45 for 45 %",
        metavar="SHARE",
    )
    confident: bool = option(False, "Let --fail-under compare the lower end of the 95 % interval.")
    fail_on_flag: Sequence[str] = option(
        (), "Exit with code 1 if any flag warns, or if this flag is raised.", metavar="[CODE]"
    )


@dataclass(frozen=True, kw_only=True)
class EvaluateFlags(EvaluateOutput, EvaluateOptions, TrustCode, ImageFlags, section="Input"):
    """Attack a model; print and store its robust accuracy. The same command resumes.

    Without a model: the built-in one on the first images of scikit-learn's digits.
    """

    examples = (
        "robustkit evaluate",
        "robustkit evaluate robustkit:cifar-resnet20@resnet20.safetensors --data test.npz --threat linf:8/255",
        "robustkit evaluate --models zoo.txt --data test.npz --threat linf:8/255 --workers 4",
    )

    model: str | None = option(None, MODEL_FORM, shown_default=DEFAULT_MODEL, positional=True)
    models: Path | None = option(
        None, "Evaluate every model of a list and rank them; one [NAME=]MODEL per line.", metavar="FILE"
    )
    threat: str | None = option(
        None,
        "NORM:EPS, e.g. linf:8/255 or l2:0.5; NORM:curve sets --curve and the usual eps; NORM:min searches for "
        "the smallest perturbation of each image.",
        metavar="THREAT",
        shown_default=DATA_DEFAULT,
    )


@dataclass(frozen=True, kw_only=True)
class PlanOptions(SearchCompute, SearchOptions, section="Forecast"):
    """Options of `robustkit.plan` and `robustkit plan`."""

    seconds: float = option(
        10.0,
        "How long to measure; more seconds make the intervals narrower.",
        Limits(0, open="low"),
        metavar="SECONDS",
        shown_default="10",
    )
    devices: Sequence[int] = option(
        (1, 8, 64),
        "Numbers of devices, each like the measured one, to forecast for.",
        metavar="N,N,…",
        shown_default="1,8,64",
        read=texts.counts("1,8,64"),
    )
    price: float | None = option(
        None, "Price of one device for one hour, to forecast the cost.", Limits(0), metavar="MONEY"
    )


@dataclass(frozen=True)
class PlanArguments(ProgressArgument, PlanOptions, ModelAndImages):
    """The arguments of `robustkit.plan`."""


@dataclass(frozen=True, kw_only=True)
class PlanFlags(JsonFlag, PlanOptions, TrustCode, ImageFlags, section="Input"):
    """Measure for some seconds what an evaluation will take, on one device and on several. Writes no file.

    All options but those of the forecast are those of `robustkit evaluate`.
    """

    examples = (
        "robustkit plan",
        "robustkit plan timm:resnet50.a1_in1k --data folder:val --threat linf:4/255 --devices 1,8,64 --price 2.5",
    )

    model: str = option(DEFAULT_MODEL, MODEL_FORM, positional=True)
    threat: str | None = option(
        None, "NORM:EPS or NORM:min, e.g. linf:8/255 or l2:0.5.", metavar="THREAT", shown_default=DATA_DEFAULT
    )


@dataclass(frozen=True)
class AttackArguments(TrustCode, ModelDevice, Seed):
    """The arguments of `robustkit.attack`."""

    model: str | Callable[[torch.Tensor], Any] = field(metadata=about(MODEL))
    x: Any = field(metadata=about(IMAGES))
    y: Any = option(None, LABELS)
    threat: ThreatModel | str | float | tuple[str, float | str] | None = option("linf:8/255", THREAT)
    attack: Suite = option(
        "pgd(steps=40)",
        "One or several attacks, which run in turn on the images that are not fooled yet: names with parameters, "
        "attack objects, or functions (model, x, y, eps) -> x_adv.",
    )
    _: KW_ONLY
    batch_size: int = option(256, "Images that an attack gets at once.", Limits(1))


@dataclass(frozen=True)
class MinimumNormArguments(TrustCode, ModelDevice, Seed):
    """The arguments of `robustkit.minimum_norm`."""

    model: str | Callable[[torch.Tensor], Any] = field(metadata=about(MODEL))
    x: Any = field(metadata=about(IMAGES))
    y: Any = option(None, LABELS)
    norm: str = option("l2", "linf, l2 or l1.")
    _: KW_ONLY
    attack: Suite = option(
        DEFAULT_SUITE,
        "auto, which takes the best of several attacks; or attacks that search for minimum norms, such as "
        "fmn(steps=200),ddn.",
    )
    batch_size: int = option(256, "Images that are attacked at once.", Limits(1))
