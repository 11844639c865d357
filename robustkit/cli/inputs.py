"""Model, data and threat from the strings on the command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from robustkit.api.options.corrupt import CorruptFlags
from robustkit.api.options.craft import DiversityFlags
from robustkit.api.options.evaluate import EvaluateFlags, PlanFlags
from robustkit.api.options.runs import DoctorFlags
from robustkit.api.options.shared import DEFAULT_MODEL
from robustkit.core.devices import pick_device
from robustkit.core.errors import UsageError
from robustkit.core.threat import ThreatModel
from robustkit.data import load_data
from robustkit.data.catalog import CATALOG
from robustkit.data.samples import Samples
from robustkit.data.strings import DataString
from robustkit.models import load_model
from robustkit.models.allowed_paths import recorded_model
from robustkit.models.classifier import Classifier
from robustkit.models.label_matching import matched_to
from robustkit.models.strings import ModelString

# The data of `robustkit evaluate` without arguments: sized to end within a minute on two cores.
BUILT_IN_DATA = "digits:test"
BUILT_IN_LIMIT = 200
# The eps that papers report in a norm, for data whose usual threat has another norm.
DEFAULT_THREATS = {"linf": "linf:8/255", "l2": "l2:0.5", "l1": "l1:12"}

AnyFlags = EvaluateFlags | PlanFlags | DiversityFlags | DoctorFlags | CorruptFlags


@dataclass(frozen=True)
class Inputs:
    """A loaded model on its device, the images, and the threat.

    Attributes:
        model: on `device`.
        samples: images and labels, labels numbered as for the model.
        threat: what the attacker may do.
        device: where to compute.
    """

    model: Classifier
    samples: Samples
    threat: ThreatModel
    device: torch.device

    @classmethod
    def load(
        cls,
        flags: EvaluateFlags | PlanFlags | DiversityFlags | DoctorFlags,
        model: str,
        *,
        threat: str | None = None,
        largest: int | None = None,
    ) -> Inputs:
        """Load a model and the data of the flags; without data the built-in model has its own.

        Args:
            flags: of the command.
            model: a model string.
            threat: instead of the threat of the flags.
            largest: number of images to use at most if the flags set no limit.

        Raises:
            UsageError: a string cannot be loaded, or there is no threat and the data has no usual one.
        """
        threat = threat or flags.threat
        rules = ThreatModel.parse(threat) if threat else None
        classifier, samples, device = load_model_and_samples(flags, model, largest)
        return cls(classifier, samples, rules or default_threat(flags.data or BUILT_IN_DATA), device)


def load_model_and_samples(
    flags: AnyFlags, model: str, largest: int | None = None
) -> tuple[Classifier, Samples, torch.device]:
    """Load a model and the data of the flags; without data the built-in model has its own.

    Args:
        flags: of the command.
        model: a model string.
        largest: number of images to use at most if the flags set no limit.

    Raises:
        UsageError: a string cannot be loaded.
    """
    data, limit = flags.data, flags.limit
    if data is None:
        named = ModelString.parse(model)
        if (named.arch, named.weights) != (DEFAULT_MODEL, None) or named.options.keys() - {"defense"}:
            raise _no_data(model)
        data, limit = BUILT_IN_DATA, limit or BUILT_IN_LIMIT
    device = pick_device(flags.device)
    classifier = load_model(model, device=device, trust_code=flags.trust_code)
    samples = load_data(data, root=flags.data_root, download=flags.download, preprocess=classifier.preprocess)
    samples = matched_to(samples, classifier)
    announce(samples)
    if limit is None and largest is not None:
        limit = min(largest, len(samples))
    return classifier, samples.head(limit), device


def load_samples(
    models: Sequence[str],
    data: str | None,
    limit: int | None,
    data_root: Path | None,
    download: bool,
    trust_code: bool,
    record: Path | None = None,
) -> Samples:
    """Return the images to craft on; without a data string the built-in model has its own.

    Args:
        models: the surrogates; image files are read at the size of the first one's input.
        data: a data string.
        limit: number of images to use.
        data_root: folder of downloaded data sets.
        download: whether to download the data set if it is absent.
        trust_code: whether to run Python code that a file names.
        record: the file that names the models, if the user did not type them.

    Raises:
        UsageError: the data or the first model cannot be loaded.
    """
    if data is None:
        if str(ModelString.parse(models[0])) != DEFAULT_MODEL:
            raise _no_data(models[0])
        data, limit = BUILT_IN_DATA, limit or BUILT_IN_LIMIT
    model = None
    if DataString.parse(data).is_pictures:
        first = models[0] if record is None else recorded_model(models[0], record, trust_code)
        model = load_model(first, trust_code=trust_code)
    preprocess = model.preprocess if model else None
    samples = load_data(data, root=data_root, download=download, preprocess=preprocess)
    samples = matched_to(samples, model) if model else samples
    announce(samples)
    return samples.head(limit)


def _no_data(model: str) -> UsageError:
    return UsageError(f"no data for {model}; use --data, e.g. --data cifar10:test or --data test.npz.")


def announce(samples: Samples) -> None:
    """Print to stderr what was left out of the data and which labels are doubtful, before hours are spent."""
    for note in samples.notes:
        print(f"note: {note}.", file=sys.stderr)
    for flag in samples.label_flags:
        value = "" if flag.value is None else f"{flag.value:g} "
        print(f"warning: {value}{flag.meaning}; {flag.remedy}.", file=sys.stderr)


def default_for_norm(norm: str, data: str | None) -> str | None:
    """Return the usual threat of a norm, that of the data if it has this norm; None for an unknown norm."""
    entry = CATALOG.get(DataString.parse(data or BUILT_IN_DATA).name)
    own = entry.threat if entry is not None else None
    return own if own and own.partition(":")[0] == norm else DEFAULT_THREATS.get(norm)


def default_threat(data: str) -> ThreatModel:
    """Return the threat that papers use on this data; UsageError if none is known."""
    entry = CATALOG.get(DataString.parse(data).name)
    if entry is None or entry.threat is None:
        raise UsageError(f"{data} has no usual threat; use --threat NORM:EPS, e.g. --threat linf:8/255.")
    return ThreatModel.parse(entry.threat)
