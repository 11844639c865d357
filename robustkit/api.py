"""The verbs as functions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from robustkit.data import from_arrays
from robustkit.data.samples import Samples
from robustkit.devices import model_device, pick_device
from robustkit.engine.anytime import Limits
from robustkit.engine.evaluate import Evaluation
from robustkit.engine.progress import Progress
from robustkit.engine.verify import Verification, verify_run
from robustkit.models import as_classifier
from robustkit.record import Report
from robustkit.registry import DEFAULT_SUITE
from robustkit.threat import ThreatModel


def evaluate(
    model: Callable[[torch.Tensor], Any],
    images: Any,
    labels: Any,
    threat: ThreatModel | str,
    *,
    suite: str = DEFAULT_SUITE,
    seed: int = 0,
    device: str | torch.device = "auto",
    precision: str = "auto",
    batch_size: int | None = None,
    curve: bool = False,
    audit: int = 0,
    time_limit: float | None = None,
    stop_at_width: float | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Return how robust a classifier is on these images, verified sample by sample.

    Args:
        model: any callable from images (B C H W) on [0, 1] to logits (B K); tuples and dicts that hold the
            logits are understood. A module is put into eval mode for the run and back after.
        images: (N C H W) floats in [0, 1], or uint8.
        labels: (N) whole numbers from 0 to K - 1.
        threat: what the attacker may do, as a `ThreatModel` or its string, e.g. `linf:8/255`.
        suite: the attacks, e.g. `autoattack` or `pgd(steps=100),autoattack:square`.
        seed: of every random number.
        device: `auto` is where the model's parameters are; another moves the model there.
        precision: of the search for adversarials: `fp32`, `bf16` or `fp16`; `auto` lets row-wise attacks search in
            bf16 where that is faster. Verdicts are float32.
        batch_size: images that an attack gets at once; None lets the engine choose.
        curve: search for each image's smallest fooling eps as well: `report.curve`.
        audit: on how many of the survivors, drawn at random, to run full AutoAttack as well: `report.audit`.
        time_limit: seconds after which to stop and report on the images done, taken in random order.
        stop_at_width: stop as soon as the 95 % interval of the robust accuracy is no wider, e.g. 0.02.
        out: a folder for the ledger and the report; the same call resumes there.
        progress: who to tell on the way.

    Raises:
        UsageError: for a request that cannot be carried out.
        RunError: when it fails on the way.
    """
    threat = ThreatModel.parse(threat) if isinstance(threat, str) else threat
    classifier = as_classifier(model)
    place = model_device(classifier) if str(device) == "auto" else pick_device(str(device))
    plan = Evaluation(
        model=classifier.to(place),
        samples=images if isinstance(images, Samples) else from_arrays(images, labels),
        threat=threat,
        suite=suite,
        seed=seed,
        device=place,
        precision=precision,
        batch_size=batch_size,
        curve=curve,
        audit=audit,
        limits=Limits(time_limit, stop_at_width),
    )
    return plan.run(Path(out) if out is not None else None, progress)


def verify(
    folder: str | Path,
    model: Callable[[torch.Tensor], Any] | None = None,
    images: Any = None,
    labels: Any = None,
    *,
    device: str = "auto",
) -> Verification:
    """Check every record of a finished run again; see `Verification.bad`.

    Model and data are loaded by the strings in the run's spec unless they are given.

    Raises:
        UsageError: if the folder holds no finished run, or model or data cannot be loaded.
    """
    return verify_run(
        Path(folder),
        model=None if model is None else as_classifier(model),
        samples=None if images is None else from_arrays(images, labels),
        device=None if device == "auto" else pick_device(device),
    )
