"""Contradictions inside a run's records: ledger, report, curve and adversarial images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from robustkit.core.errors import UsageError
from robustkit.core.threat import ThreatModel
from robustkit.data.samples import Samples
from robustkit.engine.allocation.strictness import STRICTNESS, in_doubt
from robustkit.engine.evaluation.results import RunResults
from robustkit.engine.evaluation.verdicts import image_hashes
from robustkit.runs import run_folder
from robustkit.runs.evaluation_record import Report
from robustkit.runs.ledger import Ledger
from robustkit.runs.report_parts import Curve, Strictness
from robustkit.version import __version__

# How many images are read at once.
BATCH_SIZE = 256


def ledger_faults(path: Path, report: Report, samples: Samples) -> Iterator[str]:
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


def curve_faults(report: Report) -> Iterator[str]:
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
        is_robust = distance is None or distance > eps
        if is_robust != verdict.robust or (distance == 0) != (verdict.attack == "clean"):
            yield f"record {verdict.index}: its distance in the curve, {distance}, is not that of its verdict."


def missing_records(arrays: dict[str, np.ndarray], report: Report) -> Iterator[str]:
    """Yield the records that only one of report and adversarial.npz has."""
    fooled = {v.index for v in report.verdicts if not v.robust and v.attack != "clean"}
    stored = set(arrays["index"].tolist())
    for position in sorted(fooled - stored):
        yield f"record {position}: reported as fooled, but adversarial.npz has no image of it."
    for position in sorted(stored - fooled):
        yield f"record {position}: adversarial.npz has an image of it, but the report no fooling."
