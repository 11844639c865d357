"""The report of a run whose attacks are done, with the files that belong to it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from robustkit.checks.relabelled import label_checks
from robustkit.core.flags import Flag
from robustkit.data.samples import Samples
from robustkit.engine import gradient_budgets
from robustkit.engine.evaluation.block_runner import BlockRunner
from robustkit.engine.evaluation.early_stopping import unfinished_images
from robustkit.engine.evaluation.results import RunResults
from robustkit.engine.model.image_size import enlarged_images, pixel_space
from robustkit.registry import SuiteEntry
from robustkit.runs import examples, run_folder
from robustkit.runs.environment import environment
from robustkit.runs.evaluation_record import Report
from robustkit.runs.ledger import Ledger
from robustkit.runs.report_parts import Strictness
from robustkit.runs.spec import RunSpec
from robustkit.runs.versions import record_part


def write_report(
    ledger: Ledger,
    runner: BlockRunner,
    spec: RunSpec,
    strictness: Strictness | None,
    mode_flags: Sequence[Flag],
    out: Path | None,
) -> Report:
    """Return the report of a run; write it to its folder with adversarial images, examples and hashes.

    Args:
        ledger: the run's; sealed if there is a folder.
        runner: which has run it.
        spec: of the run.
        strictness: what is known of the images that the suite's arms left.
        mode_flags: of the model's training mode.
        out: the folder; None to keep the adversarial images in the report.
    """
    results, samples, settings = runner.results, runner.samples, runner.settings
    classifier = runner.instrumented.model
    space = pixel_space(classifier, samples)
    flags = [
        *_data_flags(samples, results, runner.instrumented.num_classes or 2),
        *enlarged_images(space),
        *_short_steps(settings.entries, float(settings.threat.eps)),
        *runner.reliability.flags(),
        *mode_flags,
        *unfinished_images(results),
    ]
    fooled = np.fromiter(ledger.fooled(), np.dtype((np.int64, 3)))
    counts = np.isin(fooled[:, 0], results.scope)
    index, labels, predictions = fooled[counts].T
    shape = tuple(samples.images([0]).shape[1:])
    rows = run_folder.Adversarials(index, labels, shape, lambda: itertools.compress(ledger.adversarials(), counts))
    facts = _environment(runner)
    facts["parts"] = record_part(ledger)
    facts |= {"pixels": space, "model_notes": list(classifier.notes)}
    if out is None:
        return results.report(spec, flags, facts, {}, strictness, rows.arrays())
    run_folder.write_adversarial(out, rows)
    # The hardest first: by stage, then margin; for minimum norms by distance.
    minimal = settings.threat.minimal
    ranking = (results.distances, np.zeros(results.n)) if minimal else (results.fooled_at, results.margins)
    chosen = examples.choose(rows.index, *ranking)
    run_folder.write_examples(out, examples.arrays(rows, predictions, chosen, samples, settings.threat))
    ledger.seal()
    seals = {name: run_folder.sha256(out / name) for name in run_folder.SEALED}
    report = results.report(spec, flags, facts, seals, strictness)
    run_folder.write_report(out, report)
    return report


def _environment(runner: BlockRunner) -> dict[str, object]:
    model = runner.instrumented
    return environment(model.device, model.precision, model.micro_batch, model.threads) | runner.search_facts


def _short_steps(entries: Sequence[SuiteEntry], eps: float) -> list[Flag]:
    """Return a flag for each attack whose steps cannot reach the edge of the ball, if none of the attacks can."""
    flags = [gradient_budgets.falls_short(entry.attack, eps) for entry in entries]
    return [flag for flag in flags if flag is not None and all(flags)]


def _data_flags(samples: Samples, results: RunResults, classes: int) -> list[Flag]:
    """Return the flags of the data, and of the clean predictions."""
    labels, predictions = samples.labels[results.scope].tolist(), results.predictions[results.scope].tolist()
    return [*samples.pick(results.scope).flags, *label_checks(predictions, labels, classes)]
