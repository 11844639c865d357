"""What a verb is about: model, data and threat from the strings on the command line."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from robustkit.core.devices import pick_device
from robustkit.core.errors import UsageError
from robustkit.core.threat import ThreatModel
from robustkit.data import load_data
from robustkit.data.catalog import CATALOG
from robustkit.data.samples import Samples
from robustkit.data.strings import DataString
from robustkit.models import load_model
from robustkit.models.classifier import Classifier
from robustkit.models.label_matching import matched_to
from robustkit.models.strings import ModelString

# What `robustkit evaluate` with nothing else looks at: sized to end within a minute on two cores.
BUILT_IN = "robustkit:digits-cnn"
BUILT_IN_DATA = "digits:test"
BUILT_IN_LIMIT = 200
# The eps that papers report, for data whose own usual threat is in another norm.
USUAL = {"linf": "linf:8/255", "l2": "l2:0.5", "l1": "l1:12"}


@dataclass(frozen=True)
class Inputs:
    """A loaded model on its device, the samples, the rules."""

    model: Classifier
    samples: Samples
    threat: ThreatModel
    device: torch.device

    @classmethod
    def load(
        cls,
        model: str,
        data: str | None,
        limit: int | None,
        threat: str | None,
        device: str,
        data_root: Path | None,
        download: bool = False,
        most: int | None = None,
        trust_code: bool = False,
    ) -> Inputs:
        """Load it; without data the built-in model takes its own. `most` caps the images if no limit is given.

        `trust_code` is whether Python code that a run folder names is run.

        Raises:
            UsageError: for a string that cannot be loaded, or data without a usual threat.
        """
        if data is None:
            named = ModelString.parse(model)
            if (named.arch, named.weights) != (BUILT_IN, None) or named.options.keys() - {"defense"}:
                raise UsageError(
                    f"no data for {model}; write --data, e.g. --data cifar10:test or --data test.npz."
                )
            data, limit = BUILT_IN_DATA, limit or BUILT_IN_LIMIT
        rules = ThreatModel.parse(threat) if threat else None
        place = pick_device(device)
        classifier = load_model(model, device=place, trust_code=trust_code)
        samples = load_data(data, root=data_root, download=download, preprocess=classifier.preprocess)
        samples = matched_to(samples, classifier)
        announce(samples)
        if limit is None and most is not None:
            limit = min(most, len(samples))
        return cls(classifier, samples.head(limit), rules or usual_threat(data), place)


def announce(samples: Samples) -> None:
    """Say on stderr, before hours are spent, what was left out of the data and what makes its labels doubtful."""
    for note in samples.notes:
        print(f"note: {note}.", file=sys.stderr)
    for flag in samples.label_flags:
        value = "" if flag.value is None else f"{flag.value:g} "
        print(f"warning: {value}{flag.meaning}; {flag.remedy}.", file=sys.stderr)


def usual_of_norm(norm: str, data: str | None) -> str | None:
    """Return the usual threat of this norm, the data's own if it is of it; None if there is no such norm."""
    entry = CATALOG.get(DataString.parse(data or BUILT_IN_DATA).name)
    own = entry.threat if entry is not None else None
    return own if own and own.partition(":")[0] == norm else USUAL.get(norm)


def usual_threat(data: str) -> ThreatModel:
    """Return the threat that papers use on this data; UsageError if none is known."""
    entry = CATALOG.get(DataString.parse(data).name)
    if entry is None or entry.threat is None:
        raise UsageError(f"{data} has no usual threat; write --threat NORM:EPS, e.g. --threat linf:8/255.")
    return ThreatModel.parse(entry.threat)
