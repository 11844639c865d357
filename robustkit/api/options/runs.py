"""Options of the verbs that read finished runs, and of `doctor` and `list`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustkit.api.options.declare import Options, about, option
from robustkit.api.options.shared import DATA_FORM, IMAGES, LABELS, Device, ImageFlags, JsonFlag, TrustCode
from robustkit.core.limits import Limits

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

RUN = "Folder of a finished run."
DATA_ROOT = "Folder of downloaded data sets."


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(Device, TrustCode):
    """Options of `robustkit.verify` and `robustkit verify`."""


@dataclass(frozen=True)
class VerifyArguments(VerifyOptions):
    """The arguments of `robustkit.verify`."""

    folder: str | Path = field(metadata=about(RUN))
    model: Callable[[torch.Tensor], Any] | None = option(
        None, "A callable as in evaluate, instead of the model that the run's spec names."
    )
    images: Any = option(None, f"{IMAGES} Instead of the data that the run's spec names.")
    labels: Any = option(None, LABELS)


@dataclass(frozen=True, kw_only=True)
class VerifyFlags(VerifyOptions, section="Input"):
    """Check every record of a run again: hashes, threat model, and that the model is fooled.

    Exit code 1 if a record is bad. Records within floating-point error of a limit are listed as borderline.
    """

    examples = ("robustkit verify runs/evaluate-3f9c21ab",)

    folder: Path = field(metadata=about(RUN, metavar="DIR", positional=True))
    model: str | None = option(None, "Where the model is now, if it has moved.", metavar="MODEL")
    data: str | None = option(None, "Where the data is now, if it has moved.", metavar="DATA")
    data_root: Path | None = option(None, DATA_ROOT, metavar="DIR", shown_default="~/.cache/robustkit/data")


@dataclass(frozen=True, kw_only=True)
class ReportFlags(Options):
    """Make a page of a run: one HTML file that needs no other file; of an evaluation also a PNG card.

    Without flags: print the table again and write the page into DIR. Reads only the run folder; of a training run
    also while it is in progress.
    """

    examples = (
        "robustkit report runs/evaluate-3f9c21ab",
        "robustkit report runs/evaluate-3f9c21ab --html page.html --png card.png",
    )

    folder: Path = field(metadata=about(RUN, metavar="DIR", positional=True))
    html: Path | None = option(None, "Write the page to this file.", metavar="FILE")
    png: Path | None = option(None, "Write a card of 1200 x 630 pixels to this file.", metavar="FILE")


@dataclass(frozen=True, kw_only=True)
class CompareFlags(JsonFlag):
    """Compare two runs on the same images: paired difference, McNemar's test, images that only one run lost.

    Two craft runs are compared on every model that both were evaluated on.
    """

    examples = ("robustkit compare runs/evaluate-3f9c21ab runs/evaluate-77d0e4b2",)

    a: Path = field(metadata=about("Folder of a finished run: A.", metavar="DIR", positional=True))
    b: Path = field(metadata=about("Folder of another on the same images: B.", metavar="DIR", positional=True))


@dataclass(frozen=True, kw_only=True)
class ExportFlags(Options):
    """Write a run's verdicts as a table, one row per image."""

    examples = ("robustkit export runs/evaluate-3f9c21ab --csv verdicts.csv",)

    folder: Path = field(metadata=about(RUN, metavar="DIR", positional=True))
    csv: Path | None = option(None, "Write CSV to this file.", metavar="FILE")
    parquet: Path | None = option(None, "Write Parquet to this file; needs pyarrow.", metavar="FILE")


@dataclass(frozen=True, kw_only=True)
class DoctorFlags(JsonFlag, Device, TrustCode, ImageFlags, section="Input"):
    """Look for reasons not to trust an evaluation of a model, in seconds.

    Without a model: versions, device, and a test of the machine against distances known in closed form.
    With --aggregator: properties of that way to combine predictors, measured on random logits.
    """

    examples = (
        "robustkit doctor",
        "robustkit doctor --aggregator crossmax:3 --predictors 8 --classes 10",
        "robustkit doctor ./my_net.py:build@w.pt --data test.npz --threat linf:8/255",
    )

    model: str | None = option(None, "The model; without one, the machine is examined.", positional=True)
    data: str | None = option(None, DATA_FORM, metavar="DATA")
    limit: int | None = option(None, "Use only the first N images.", Limits(1), metavar="N", shown_default="64")
    aggregator: str | None = option(
        None,
        "Show the fact sheet of probabilities, logits, vote, median, crossmax or crossmax:K instead.",
        metavar="NAME",
    )
    predictors: int = option(8, "With --aggregator: number of predictors.", Limits(2), metavar="N")
    classes: int = option(10, "With --aggregator: number of classes.", Limits(2), metavar="N")


@dataclass(frozen=True, kw_only=True)
class ListFlags(JsonFlag):
    """List what can be named: attacks, techniques, recipes, methods, defenses, suites, models, data."""

    examples = ("robustkit list techniques", "robustkit list cwa")

    what: str | None = option(
        None,
        "One of them, or a name in them: its fields with their defaults, and what they mean.",
        metavar="[attacks|techniques|recipes|methods|defenses|suites|models|data|NAME]",
        positional=True,
    )
