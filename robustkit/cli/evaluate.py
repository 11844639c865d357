"""`robustkit evaluate`: strings to objects, the run, its table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console

from robustkit.cli.progress import Display
from robustkit.cli.report import write_page
from robustkit.cli.subject import Subject, usual_of_norm
from robustkit.engine.anytime import Limits
from robustkit.engine.evaluate import Evaluation
from robustkit.engine.folder import PAGE
from robustkit.errors import UsageError
from robustkit.report.table import percent, show

UNITS = {"s": 1, "m": 60, "h": 3600}


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
    curve: bool,
    audit: int,
    time_limit: str | None,
    stop_at_width: float | None,
    workers: int | None,
    ray: str | None,
    out: Path | None,
    data_root: Path | None,
    download: bool,
    with_page: bool,
    as_json: bool,
    fail_under: float | None,
) -> int:
    """Run the verb; return 1 if the robust accuracy is below `fail_under`, else 0."""
    if fail_under is not None and not 0 <= fail_under <= 1:
        raise UsageError(f"--fail-under {fail_under:g}: write a share from 0 to 1, e.g. 0.45 for 45 %.")
    norm, _, eps = (threat or "").partition(":")
    if eps == "curve" and (usual := usual_of_norm(norm, data)):
        threat, curve = usual, True
    subject = Subject.load(model, data, limit, threat, device, data_root, download)
    plan = Evaluation(
        model=subject.model,
        samples=subject.samples,
        threat=subject.threat,
        suite=suite,
        seed=seed,
        device=subject.device,
        precision=precision,
        batch_size=read_batch_size(batch_size),
        curve=curve,
        audit=audit,
        limits=Limits(None if time_limit is None else _seconds(time_limit), stop_at_width),
        workers=workers,
        ray=ray,
    )
    folder = out or Path("runs") / f"evaluate-{plan.spec.run_id}"
    report = plan.run(folder, Display())
    if with_page:
        write_page(folder, report)
    if as_json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        page = folder / PAGE
        show(report, Console(markup=False), f"robustkit verify {folder}", page if page.exists() else None)
    if fail_under is not None and report.robust_accuracy.value < fail_under:
        found = percent(report.robust_accuracy.value)
        print(f"robust accuracy {found} is below --fail-under {percent(fail_under)}", file=sys.stderr)
        return 1
    return 0


def _seconds(text: str) -> float:
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
