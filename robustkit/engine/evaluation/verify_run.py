"""Checks a finished run again, record by record: bytes, hashes, ball and box, and the model's predictions."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from robustkit.core.errors import UsageError
from robustkit.core.isolation import evaluation_mode, own_randomness
from robustkit.core.threat import ThreatModel
from robustkit.data import load_data
from robustkit.data.samples import Samples
from robustkit.engine.evaluation.record_faults import BATCH_SIZE, curve_faults, ledger_faults, missing_records
from robustkit.engine.evaluation.verdicts import margins
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.models import load_model
from robustkit.models.allowed_paths import recorded_model
from robustkit.models.classifier import Classifier
from robustkit.models.label_matching import matched_to
from robustkit.models.recorded_data import recorded_data
from robustkit.runs import run_folder
from robustkit.runs.evaluation_record import Report
from robustkit.runs.report_parts import ROUNDING

FLOAT_NOISE = Fraction(1, 10**5)
# Repeated passes by which a random model is recognised; one with few outcomes may give the same one twice.
REPEATED_PASSES = 8


@dataclass
class Verification:
    """The result: `checked` adversarial images, `bad` records by name, and `borderline` ones.

    Borderline is a margin within float32 noise (1e-5 of the largest logit), which another machine may round to the
    other side, or a random model that is right in the one draw made here. Neither is a fault of the record.
    `stopped` is whether hashes alone were checked, since they were wrong.
    """

    report: Report
    checked: int = 0
    bad: list[str] = field(default_factory=list)
    borderline: list[str] = field(default_factory=list)
    stopped: bool = False


def verify_run(
    path: Path,
    *,
    model: Classifier | str | None,
    samples: Samples | str | None,
    device: torch.device | None,
    data_root: Path | None = None,
    trust_code: bool = False,
) -> Verification:
    """Check the records of a run folder; model and data come from its spec unless given.

    Hashes are checked first: if a file is not that of the run, nothing that the record names is loaded.

    Args:
        path: the run's folder.
        model: instead of the one that the record names.
        samples: instead of the data that the record names.
        device: where to compute; None for the model's device.
        data_root: where downloaded sets are.
        trust_code: whether Python code that the record names may run.

    Raises:
        UsageError: if there is no finished run, or model or data cannot be loaded, or the record names code that
            is not trusted.
    """
    report = run_folder.read_report(path, forged=True)
    found = Verification(report, bad=run_folder.broken_seals(path, report))
    if report.run_id != report.spec.run_id:
        found.bad.append(f"report.json: its spec is not that of run {report.run_id}.")
    if found.bad and (model is None or samples is None):
        found.stopped = True
        return found
    model = _loaded(model, path, report, trust_code)
    if not isinstance(samples, Samples):
        string = samples or recorded_data(_named(report, "data"), path / run_folder.REPORT)
        samples = load_data(string, root=data_root, preprocess=model.preprocess)
        samples = matched_to(samples, model).head(report.spec.data["n"])
    if device is not None:
        model = model.to(device)
    if model.fingerprint != report.spec.model["fingerprint"]:
        found.bad.append(
            f"model {report.spec.model['string']}: its weights or code have changed since the run "
            f"(fingerprint {model.fingerprint[:12]}…, was {report.spec.model['fingerprint'][:12]}…)."
        )
    if len(samples) != report.spec.data["n"]:
        raise UsageError(f"{samples.name} holds {len(samples)} images, the run had {report.spec.data['n']}.")
    found.bad += [*ledger_faults(path, report, samples), *curve_faults(report)]
    try:
        arrays = run_folder.read_adversarial(path)
    except UsageError as error:
        found.bad.append(str(error))
        return found
    found.bad += missing_records(arrays, report)
    instrumented = InstrumentedModel(model.expect(samples.num_classes), device or torch.device("cpu"))
    threat = ThreatModel.parse(report.spec.threat)
    with evaluation_mode(model), own_randomness(report.spec.seed, "verify"):
        for begin in range(0, len(arrays["index"]), BATCH_SIZE):
            _check_batch(found, instrumented, samples, threat, arrays, slice(begin, begin + BATCH_SIZE))
    return found


def _check_batch(
    found: Verification,
    instrumented: InstrumentedModel,
    samples: Samples,
    threat: ThreatModel,
    arrays: dict[str, np.ndarray],
    part: slice,
) -> None:
    positions, labels = arrays["index"][part], arrays["y"][part]
    known = (positions >= 0) & (positions < len(samples))
    for position in positions[~known]:
        found.bad.append(f"record {position}: the data has no such image.")
    positions, labels = positions[known], labels[known]
    if not len(positions):
        return
    x_adv = torch.from_numpy(arrays["x"][part][known]).to(instrumented.device)
    x = samples.images(positions).to(instrumented.device)
    if x_adv.shape != x.shape:
        found.bad.append(f"adversarial.npz: images of {tuple(x_adv.shape[1:])}, data of {tuple(x.shape[1:])}.")
        return
    logits = instrumented.logits_fp32(x_adv)
    y = torch.from_numpy(labels).to(instrumented.device)
    inside, distance = threat.contains(x_adv, x).tolist(), threat.distance(x_adv, x).tolist()
    fooled = ((logits.argmax(1) != y) & logits.isfinite().all(1)).tolist()
    margin = margins(logits, y)
    noise = float(FLOAT_NOISE) * logits.abs().amax(1).clamp(min=1)
    close = (margin.abs() <= noise).tolist()
    stated = _stated(found.report)
    random = not all(fooled) and _is_random(instrumented, x_adv, logits)
    for row, position in enumerate(positions.tolist()):
        found.checked += 1
        if labels[row] != samples.labels[position]:
            found.bad.append(f"record {position}: label {labels[row]}, the data says {samples.labels[position]}.")
        if not inside[row]:
            found.bad.append(
                f"record {position}: outside the threat {threat}: distance {distance[row]:.8g}, "
                f"values {x_adv[row].min():.6g} to {x_adv[row].max():.6g}."
            )
        if position in stated and distance[row] > stated[position] * (1 + ROUNDING):
            found.bad.append(
                f"record {position}: its distance is {distance[row]:.8g}, the report says {stated[position]:.8g}."
            )
        if close[row]:
            found.borderline.append(f"record {position}: margin {margin[row]:.2e} is within float noise.")
        elif not fooled[row] and random:
            found.borderline.append(
                f"record {position}: the model is random and correct in this draw, margin {margin[row]:.4g}."
            )
        elif not fooled[row]:
            found.bad.append(f"record {position}: does not fool the model, margin {margin[row]:.4g}.")


def _stated(report: Report) -> dict[int, float]:
    """Return the distance that the report states for each position, in a run for minimum norms."""
    if report.minimum is None:
        return {}
    pairs = zip(report.verdicts, report.minimum.distances, strict=True)
    return {verdict.index: distance for verdict, distance in pairs if distance is not None}


def _is_random(instrumented: InstrumentedModel, x: torch.Tensor, logits: torch.Tensor) -> bool:
    """Return whether logits of these images change within `REPEATED_PASSES` repeated passes."""
    noise = float(FLOAT_NOISE) * logits.abs().amax().clamp(min=1)
    return any(bool((instrumented.logits_fp32(x) - logits).abs().amax() > noise) for _ in range(REPEATED_PASSES))


def _loaded(model: Classifier | str | None, path: Path, report: Report, trust_code: bool) -> Classifier:
    """Return the model that was given, else the one that the record names, if it may be loaded."""
    if isinstance(model, Classifier):
        return model
    string = model or recorded_model(_named(report, "model"), path / run_folder.REPORT, trust_code)
    return load_model(string, trust_code=trust_code)


def _named(report: Report, what: str) -> str:
    """Return the string of the model or the data of a run; UsageError if it was made from Python."""
    string: str = getattr(report.spec, what)["string"]
    if string.startswith("python:"):
        raise UsageError(
            f"run {report.run_id} was made from Python with {string}; "
            "verify it there: robustkit.verify(folder, model, images, labels)."
        )
    return string
