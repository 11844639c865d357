"""`robustkit evaluate`: strings to objects, the run, its table."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from robustkit.api import pick_device
from robustkit.cli.progress import Display
from robustkit.data import load_data
from robustkit.data.catalog import CATALOG
from robustkit.engine.evaluate import Evaluation
from robustkit.errors import UsageError
from robustkit.models import load_model
from robustkit.models.strings import ModelString
from robustkit.report.table import show
from robustkit.threat import ThreatModel

# What `robustkit evaluate` with nothing else looks at: sized to end within a minute on two cores.
BUILT_IN = "robustkit:digits-cnn"
BUILT_IN_LIMIT = 128


def evaluate(
    *,
    model: str,
    data: str | None,
    limit: int | None,
    threat: str | None,
    suite: str,
    seed: int,
    device: str,
    precision: str,
    batch_size: str,
    out: Path | None,
    data_root: Path | None,
    download: bool,
    as_json: bool,
) -> int:
    """Run the verb; return the exit code."""
    if data is None:
        if str(ModelString.parse(model)) != BUILT_IN:
            raise UsageError(f"no data for {model}; write --data, e.g. --data cifar10:test or --data test.npz.")
        data, limit = "digits:test", limit or BUILT_IN_LIMIT
    usual = CATALOG[data.partition(":")[0]].threat if data.partition(":")[0] in CATALOG else None
    if threat is None and usual is None:
        raise UsageError(f"{data} has no usual threat; write --threat NORM:EPS, e.g. --threat linf:8/255.")
    rules = ThreatModel.parse(threat or str(usual))
    place = pick_device(device)
    classifier = load_model(model, device=place)
    plan = Evaluation(
        model=classifier,
        samples=load_data(data, root=data_root, download=download, preprocess=classifier.preprocess).head(limit),
        threat=rules,
        suite=suite,
        seed=seed,
        device=place,
        precision=precision,
        batch_size=_batch_size(batch_size),
    )
    folder = out or Path("runs") / f"evaluate-{plan.spec.run_id}"
    report = plan.run(folder, Display())
    if as_json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        show(report, Console(), f"robustkit verify {folder}")
    return 0


def _batch_size(text: str) -> int | None:
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"batch size {text!r}: write a whole number, or auto.") from None
