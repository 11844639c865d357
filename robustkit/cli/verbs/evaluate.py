"""`robustkit evaluate`: strings to objects, the run, its table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from robustkit.cli.gates import Gate
from robustkit.cli.inputs import BUILT_IN, Inputs, usual_of_norm, usual_threat
from robustkit.cli.output import result_console
from robustkit.cli.progress import Display
from robustkit.cli.streams import print_result
from robustkit.cli.verbs.leaderboard import Ends, shortened, sweep
from robustkit.cli.verbs.report import write_page
from robustkit.core.errors import UsageError
from robustkit.core.threat import MINIMAL
from robustkit.engine.allocation.rounds import read_strictness
from robustkit.engine.evaluation.early_stopping import Limits
from robustkit.engine.evaluation.leaderboard import LeaderboardRun, NamedModel, read_models, settings_id
from robustkit.engine.evaluation.run import Evaluation
from robustkit.models.allowed_paths import FLAG, names_code, refuse_code
from robustkit.registry import parse_suite
from robustkit.reporting.terminal.evaluation import show
from robustkit.runs.run_folder import PAGE

UNITS = {"s": 1, "m": 60, "h": 3600}


def evaluate(
    *,
    model: str | None,
    models: Path | None,
    data: str | None,
    limit: int | None,
    threat: str | None,
    suite: str,
    seed: int,
    device: str,
    precision: str,
    batch_size: str,
    curve: bool,
    audit: int,
    strictness: str | None,
    time_limit: str | None,
    stop_at_width: float | None,
    workers: int | None,
    ray: str | None,
    out: Path | None,
    overwrite: bool,
    data_root: Path | None,
    download: bool,
    trust_code: bool,
    with_page: bool,
    as_json: bool,
    fail_under: float | None,
    confident: bool,
    fail_on_flag: Sequence[str],
) -> int:
    """Run the verb; return 1 if the result does not pass `fail_under` or `fail_on_flag`, else 0."""
    gate = Gate.read(fail_under, confident, fail_on_flag)
    norm, _, eps = (threat or "").partition(":")
    if eps == "curve" and (usual := usual_of_norm(norm, data)):
        threat, curve = usual, True
    if eps.strip().lower() == MINIMAL and (fail_under is not None or models is not None):
        what = "--models ranks by robust accuracy" if models else "--fail-under compares robust accuracy"
        raise UsageError(f"{what} within an eps, which threat '{threat}' does not have; leave it out.")
    images, limits = read_batch_size(batch_size), Limits(_seconds(time_limit), stop_at_width)
    share = read_strictness(strictness)

    def plan(string: str, rules: str | None = threat) -> Evaluation:
        subject = Inputs.load(string, data, limit, rules, device, data_root, download, trust_code=trust_code)
        return Evaluation(
            model=subject.model,
            samples=subject.samples,
            threat=subject.threat,
            suite=suite,
            seed=seed,
            device=subject.device,
            precision=precision,
            batch_size=images,
            curve=curve,
            audit=audit,
            strictness=share,
            limits=limits,
            workers=workers,
            ray=ray,
        )

    ends = Ends(with_page, as_json, gate)
    if models is None:
        return _one(plan(model or BUILT_IN), out, overwrite, ends)
    if model is not None:
        raise UsageError(f"both a model, {model}, and a list of models; write it into {models} instead.")
    if data is None:
        raise UsageError("no data for the list of models; write --data, e.g. --data cifar10:test.")
    entries, usual = shortened(read_models(models)), threat or str(usual_threat(data))
    parse_suite(suite, usual.partition(":")[0])
    more = {} if share is None else {"strictness": share}
    id = settings_id(data=data, limit=limit, threat=usual, suite=suite, seed=seed, **more)

    def listed(entry: NamedModel) -> Evaluation:
        # A list may be somebody else's: its lines are not typed on this command line.
        if not trust_code:
            refuse_code(entry.string, models)
        return plan(entry.string, usual)

    made = LeaderboardRun(entries, listed, workers, ray)
    return sweep(made, id, out or Path("runs") / f"leaderboard-{id}", overwrite, ends)


def _one(plan: Evaluation, out: Path | None, overwrite: bool, ends: Ends) -> int:
    """Evaluate one model."""
    folder = out or Path("runs") / f"evaluate-{plan.spec.run_id}"
    report = plan.run(folder, Display(), overwrite=overwrite)
    if ends.with_page:
        write_page(folder, report)
    results = [("", report.robust_accuracy, report.flags)]
    if ends.as_json:
        print_result(json.dumps(report.to_json() | ends.gate.record(results), indent=2))
    else:
        page = folder / PAGE
        trust = f" {FLAG}" if plan.model.trust_code or names_code(plan.model.string) else ""
        show(report, result_console(), f"robustkit verify {folder}{trust}", page if page.exists() else None)
    return ends.gate.judge(results)


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    number, unit = (text[:-1], text[-1]) if text[-1:] in UNITS else (text, "s")
    try:
        return float(number) * UNITS[unit]
    except ValueError:
        raise UsageError(f"time limit {text!r}: write seconds, or such as 90s, 10m or 2h.") from None


def read_batch_size(text: str) -> int | None:
    """Return a number of images, None for `auto`."""
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"batch size {text!r}: write a whole number, or auto.") from None
