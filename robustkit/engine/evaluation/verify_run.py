"""Checks a finished run again, record by record: bytes, hashes, ball and box, and the model's predictions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from robustkit.core.errors import UsageError
from robustkit.core.isolation import evaluation_mode, own_randomness
from robustkit.core.threat import ThreatModel
from robustkit.data import load_data
from robustkit.data.samples import Samples
from robustkit.engine.allocation.strictness import STRICTNESS, in_doubt
from robustkit.engine.evaluation.results import RunResults
from robustkit.engine.evaluation.verdicts import image_hashes, margins
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.models import load_model
from robustkit.models.allowed_paths import recorded_model
from robustkit.models.classifier import Classifier
from robustkit.models.label_matching import matched_to
from robustkit.models.recorded_data import recorded_data
from robustkit.runs import run_folder
from robustkit.runs.evaluation_record import ROUNDING, Curve, Report, Strictness
from robustkit.runs.ledger import Ledger
from robustkit.version import __version__

BATCH_SIZE = 256
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
    found.bad += [*_ledger_faults(path, report, samples), *_curve_faults(report)]
    try:
        arrays = run_folder.read_adversarial(path)
    except UsageError as error:
        found.bad.append(str(error))
        return found
    found.bad += _missing_records(arrays, report)
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
                f"record {position}: the model is random and stands in this draw, margin {margin[row]:.4g}."
            )
        elif not fooled[row]:
            found.bad.append(f"record {position}: does not fool the model, margin {margin[row]:.4g}.")


def _stated(report: Report) -> dict[int, float]:
    """Return the distance that the report states for each position, in a run for minimum norms."""
    if report.minimum is None:
        return {}
    pairs = zip(report.verdicts, report.minimum.distances, strict=True)
    return {verdict.index: far for verdict, far in pairs if far is not None}


def _is_random(instrumented: InstrumentedModel, x: torch.Tensor, logits: torch.Tensor) -> bool:
    """Return whether logits of these images change within `REPEATED_PASSES` repeated passes."""
    noise = float(FLOAT_NOISE) * logits.abs().amax().clamp(min=1)
    return any(bool((instrumented.logits_fp32(x) - logits).abs().amax() > noise) for _ in range(REPEATED_PASSES))


def _ledger_faults(path: Path, report: Report, samples: Samples) -> Iterator[str]:
    """Yield what is wrong with the ledger, with the images it was made from, or with the report of it."""
    results = RunResults.of(len(samples), report.spec.suite)
    try:
        with Ledger.read(path / run_folder.LEDGER, report.run_id) as ledger:
            ledger.require(len(samples), samples.images([0]).nbytes, len(report.spec.suite))
            for chunk in ledger.chunks():
                results.add(chunk)
    except UsageError as error:
        yield str(error)
        return
    results.scope = np.array([verdict.index for verdict in report.verdicts], np.int64)
    results.stopped = report.stopped
    again = results.report(report.spec, [], report.environment, report.files)
    for stated, ours in zip(report.verdicts, again.verdicts, strict=True):
        if stated != ours:
            yield f"record {ours.index}: report.json says {stated}, the ledger {ours}."
    if (report.stages, report.robust_accuracy, report.clean_accuracy, report.cost) != (
        again.stages,
        again.robust_accuracy,
        again.clean_accuracy,
        again.cost,
    ):
        yield "report.json: its accuracies, stages or costs are not those of the ledger."
    if report.minimum != again.minimum:
        yield "report.json: its minimum norms are not those of the ledger."
    yield from _doubt_faults(report, results)
    for begin in range(0, report.n, BATCH_SIZE):
        positions = results.scope[begin : begin + BATCH_SIZE]
        for position, digest in zip(positions, image_hashes(samples.images(positions)), strict=True):
            if digest != results.images[position]:
                yield f"record {position}: the image in {samples.name} has changed since the run."
            elif samples.labels[position] != results.labels[position]:
                yield f"record {position}: its label in {samples.name} has changed since the run."


def _doubt_faults(report: Report, results: RunResults) -> Iterator[str]:
    """Yield the report's bound on images left in doubt, if the ledger gives another; none for a random model."""
    if report.draws:
        return
    stated = report.strictness
    allowed = stated.allowed if stated else STRICTNESS
    strictness = allowed if report.spec.strictness is None else report.spec.strictness
    again = in_doubt(results, results.scope, strictness)
    versions = report.environment.get("versions") or {}
    if stated and again and versions.get("robustkit") != __version__:
        # Another version may use another prior, but counts the same images.
        again = replace(again, images=stated.images, bound=stated.images / report.n)
    if stated != again:
        yield f"report.json: it says that {_in_words(stated)}, by the ledger {_in_words(again)}."


def _in_words(doubt: Strictness | None) -> str:
    if doubt is None:
        return "it states no strictness"
    return (
        f"{doubt.images} images ({doubt.bound:.6g}, allowed {doubt.allowed:.6g}) are left in doubt and "
        f"{doubt.in_full} of {doubt.standing} met all attacks"
    )


def _curve_faults(report: Report) -> Iterator[str]:
    """Yield what the curve says against its own distances, the verdicts, or the robust accuracy at eps."""
    curve = report.curve
    if curve is None:
        return
    eps = float(ThreatModel.parse(report.spec.threat).eps)
    if list(curve.radii) != sorted(set(curve.radii)) or eps not in curve.radii:
        yield f"report.json: the radii of its curve do not rise, or leave out eps {eps:.6g}."
        return
    at_eps = curve.robust_accuracy[curve.radii.index(eps)]
    if at_eps != report.robust_accuracy:
        yield (
            f"report.json: its curve says {at_eps.value:.6g} at eps, its robust accuracy is "
            f"{report.robust_accuracy.value:.6g}."
        )
    again = Curve.of(curve.radii, curve.distances, curve.cost)
    if again != curve or sorted(curve.robust_accuracy, key=lambda rate: -rate.value) != curve.robust_accuracy:
        yield "report.json: its curve is not that of its distances."
    for verdict, distance in zip(report.verdicts, curve.distances, strict=True):
        stands = distance is None or distance > eps
        if stands != verdict.robust or (distance == 0) != (verdict.attack == "clean"):
            yield f"record {verdict.index}: its distance in the curve, {distance}, is not that of its verdict."


def _missing_records(arrays: dict[str, np.ndarray], report: Report) -> Iterator[str]:
    """Yield the records that only one of report and adversarial.npz has."""
    fooled = {v.index for v in report.verdicts if not v.robust and v.attack != "clean"}
    stored = set(arrays["index"].tolist())
    for position in sorted(fooled - stored):
        yield f"record {position}: reported as fooled, but adversarial.npz has no image of it."
    for position in sorted(stored - fooled):
        yield f"record {position}: adversarial.npz has an image of it, but the report no fooling."


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
