"""`robustkit evaluate`: from flags to objects, the run, its table."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from robustkit.api.evaluate import evaluation
from robustkit.api.options.evaluate import EvaluateFlags
from robustkit.api.options.shared import DEFAULT_MODEL
from robustkit.cli.gates import Gate
from robustkit.cli.inputs import Inputs, default_for_norm, default_threat
from robustkit.cli.output import result_console
from robustkit.cli.progress import Display
from robustkit.cli.streams import print_result
from robustkit.cli.verbs.leaderboard import ResultOptions, run_leaderboard, shortened
from robustkit.cli.verbs.report import write_page
from robustkit.core.determinism import prepare_deterministic
from robustkit.core.errors import UsageError
from robustkit.core.threat import MINIMAL
from robustkit.engine.allocation.rounds import read_strictness
from robustkit.engine.evaluation.leaderboard import LeaderboardRun, NamedModel, read_models, settings_id
from robustkit.engine.evaluation.run import Evaluation
from robustkit.models.allowed_paths import FLAG, names_code, refuse_code
from robustkit.registry import parse_suite
from robustkit.registry.construction import code_digests
from robustkit.reporting.terminal.evaluation import show
from robustkit.runs.run_folder import PAGE


def evaluate(flags: EvaluateFlags) -> int:
    """Run the verb; return 1 if the result does not pass --fail-under or --fail-on-flag, else 0."""
    prepare_deterministic(flags.deterministic)
    gate = Gate.read(flags.fail_under, flags.confident, flags.fail_on_flag)
    flags = _with_default_eps(flags)
    if flags.threat and flags.threat.partition(":")[2].strip().lower() == MINIMAL:
        _refuse_eps(flags)

    def request(model: str, threat: str | None = flags.threat) -> Evaluation:
        inputs = Inputs.load(flags, model, threat=threat)
        return evaluation(flags, inputs.model, inputs.samples, inputs.threat, inputs.device)

    result = ResultOptions(not flags.no_html, flags.json, gate)
    if flags.models is not None:
        return _models(flags, flags.models, request, result)
    return _one(request(flags.model or DEFAULT_MODEL), flags, result)


def _with_default_eps(flags: EvaluateFlags) -> EvaluateFlags:
    """Return the flags with `NORM:curve` replaced by the usual eps of the norm and --curve."""
    norm, _, eps = (flags.threat or "").partition(":")
    if eps == "curve" and (default := default_for_norm(norm, flags.data)):
        return replace(flags, threat=default, curve=True)
    return flags


def _refuse_eps(flags: EvaluateFlags) -> None:
    """Refuse flags that need an eps, which a search for minimum norms does not have."""
    if flags.models is not None or flags.fail_under is not None:
        what = "--models ranks by robust accuracy" if flags.models else "--fail-under compares robust accuracy"
        raise UsageError(f"{what} within an eps, which threat '{flags.threat}' does not have; leave it out.")


def _models(
    flags: EvaluateFlags, file: Path, request: Callable[[str, str], Evaluation], result: ResultOptions
) -> int:
    """Evaluate a list of models."""
    if flags.model is not None:
        raise UsageError(f"both a model, {flags.model}, and a list of models; put the model into {file} instead.")
    if flags.data is None:
        raise UsageError("no data for the list of models; use --data, e.g. --data cifar10:test.")
    entries, threat = shortened(read_models(file)), flags.threat or str(default_threat(flags.data))
    attacks = parse_suite(flags.suite, threat.partition(":")[0])
    share = read_strictness(flags.strictness)
    more: dict[str, object] = {} if share is None else {"strictness": share}
    # The strings of plug-ins say where their code is, and not what it is.
    if code := [digest for entry in attacks for digest in code_digests(entry.spec)]:
        more["code"] = code
    id = settings_id(data=flags.data, limit=flags.limit, threat=threat, suite=flags.suite, seed=flags.seed, **more)

    def listed(entry: NamedModel) -> Evaluation:
        # The list may have been written by another person: its lines were not typed on this command line.
        if not flags.trust_code:
            refuse_code(entry.string, file)
        return request(entry.string, threat)

    models = LeaderboardRun(entries, listed, flags.workers, flags.ray)
    return run_leaderboard(models, id, Path(flags.out or f"runs/leaderboard-{id}"), flags.overwrite, result)


def _one(request: Evaluation, flags: EvaluateFlags, result: ResultOptions) -> int:
    """Evaluate one model."""
    folder = Path(flags.out or f"runs/evaluate-{request.spec.run_id}")
    report = request.run(folder, Display(), overwrite=flags.overwrite)
    if result.with_page:
        write_page(folder, report)
    results = [("", report.robust_accuracy, report.flags)]
    if result.as_json:
        print_result(json.dumps(report.to_json() | result.gate.record(results), indent=2))
    else:
        page = folder / PAGE
        trust = f" {FLAG}" if request.model.trust_code or names_code(request.model.string) else ""
        show(report, result_console(), f"robustkit verify {folder}{trust}", page if page.exists() else None)
    return result.gate.check(results)
