"""An evaluation's report as tables for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from robustkit.core.flags import Flag
from robustkit.reporting import costs
from robustkit.reporting import quantiles as minimum
from robustkit.reporting.image_sizes import remarks, size
from robustkit.reporting.names import data_name
from robustkit.reporting.versions import made_in_parts
from robustkit.runs.distances import Minimum
from robustkit.runs.evaluation_record import Report
from robustkit.runs.report_parts import SCORE_TESTED, Curve, Rate, Strictness
from robustkit.runs.spec import RunSpec

# Positions in a curve's radii that the terminal prints: eps/4, eps/2, eps, 1.5 eps and 2 eps.
SHOWN_RADII = (1, 3, 7, 11, 15)
# One pass: one image through the model once, forward or backward.
PASSES = "passes per image"
PASSES_COLUMN = "passes/image"


def show(report: Report, console: Console, next_command: str | None = None, page: object | None = None) -> None:
    """Print run, stages, result, flags, where the page is, and the next command."""
    data = data_name(report.spec.data["string"])
    console.print(
        f"run {report.run_id}   {report.n} image{'s' * (report.n != 1)} of {data}"
        f"{size(report) and f' ({size(report)})'}   {report.spec.threat}   "
        f"seed {report.spec.seed}   {report.environment['device_name']}\n",
        highlight=False,
    )
    if report.minimum:
        _show_minimum(report, report.minimum, console)
    else:
        console.print(_stages(report), highlight=False)
    if report.curve:
        spent = report.curve.cost
        price = f"{passes(spent.forwards + spent.backwards, report.n)}   {duration(spent.seconds)}"
        console.print()
        console.print(_curve(report.curve), highlight=False)
        console.print(f"median smallest fooling eps {median(report.curve)}   {price}", highlight=False)
    for line in [*notes(report), *flag_lines(report.flags)]:
        console.print(line, highlight=False, soft_wrap=True)
    if page or next_command:
        console.print()
    if page:
        console.print(f"report   {page}", highlight=False, soft_wrap=True)
    if next_command:
        console.print(f"next     {next_command}", highlight=False, soft_wrap=True)


def _stages(report: Report) -> Table:
    """Return a row per stage with the robust accuracy after it, and the result."""
    table = Table(box=None, pad_edge=False, header_style="", padding=(0, 2, 0, 0))
    table.add_column("attack", no_wrap=True)
    for name in ("robust acc", "95% interval", "fooled", PASSES_COLUMN, "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in costs.rows(report):
        table.add_row(
            row.attack,
            percent(row.rate.value) if row.rate else "–",
            interval(row.rate) if row.rate else "–",
            row.fooled,
            f"{row.passes / row.entering:,.0f}" if row.entering else "–",
            duration(row.seconds),
        )
    cost = report.cost
    table.add_row(
        "worst case",
        percent(report.robust_accuracy.value),
        interval(report.robust_accuracy),
        f"{costs.fooled(report):,}",
        f"{(cost.forwards + cost.backwards) / report.n:,.0f}",
        duration(cost.seconds),
        style="bold",
    )
    if bound := report.strictness:
        table.add_row("unresolved", f"≤ {fine(bound.bound)}", "with 95 %", f"≤ {bound.images:,}", "", "")
    return table


def _show_minimum(report: Report, found: Minimum, console: Console) -> None:
    """Print how many nearest images each attack found, and the quantiles of the distances."""
    stages, quantiles = (Table(box=None, pad_edge=False, header_style="", padding=(0, 3, 0, 0)) for _ in range(2))
    stages.add_column("attack", no_wrap=True)
    for name in ("nearest", PASSES_COLUMN, "time"):
        stages.add_column(name, justify="right", no_wrap=True)
    for row in costs.rows(report):
        price = f"{row.passes / row.entering:,.0f}" if row.entering else "–"
        stages.add_row(row.attack, row.fooled, price, duration(row.seconds))
    cost = report.cost
    price = f"{(cost.forwards + cost.backwards) / report.n:,.0f}"
    stages.add_row("all", f"{costs.fooled(report):,}", price, duration(cost.seconds), style="bold")
    quantiles.add_column("quantile", no_wrap=True)
    for name, _ in (columns := minimum.columns(found)):
        quantiles.add_column(name, justify="right", no_wrap=True)
    quantiles.add_row("minimum norm", *(text for _, text in columns), style="bold")
    console.print(stages, highlight=False)
    console.print()
    console.print(quantiles, highlight=False)
    console.print(minimum.sentence(found), highlight=False, soft_wrap=True)


def notes(report: Report) -> list[str]:
    """Return remarks on images and model, why the run stopped early, and the results of draws, bound and audit."""
    lines = [f"\n{remark}" for remark in remarks(report)]
    if versions := made_in_parts(report.environment):
        lines += [f"\n{versions}"]
    if report.stopped:
        why = {"width": "interval narrow enough", "time-limit": "time limit reached"}[report.stopped.reason]
        lines += [
            f"\nstopped early: {why} after {report.n:,} of {report.stopped.images:,} images, drawn at random; the "
            "intervals remain valid however often a run is looked at"
        ]
    if draws := report.draws:
        lines += [
            f"\nrandomised model: accuracy by the majority of draws {percent(draws.majority.value)}, as above; by "
            f"one draw {percent(draws.one.value)} ({interval(draws.one)}); mean over draws {percent(draws.mean)}; "
            f"if one wrong draw during the search counted as a success {percent(draws.mean - draws.gap)}"
        ]
    if bound := report.strictness:
        lines += [f"\n{unresolved(bound, report.spec)}"]
    if audit := report.audit:
        spent = (audit.cost.forwards + audit.cost.backwards) / max(len(audit.audited), 1)
        lines += [
            f"\naudit: AutoAttack fooled {len(audit.broke)} of {len(audit.audited)} robust images drawn at "
            f"random; on all it would leave a robust accuracy of {percent(audit.robust_accuracy.value)} "
            f"({interval(audit.robust_accuracy)})   {spent:,.0f} {PASSES}   {duration(audit.cost.seconds)}"
        ]
    return lines


def has_autoattack(spec: RunSpec) -> bool:
    """Return whether the arms of a run's suite include AutoAttack's four attacks."""
    arms = [record for record in spec.suite if record.get("arm")]
    ce = any(record["name"] == "apgd" and record.get("loss") == "ce" for record in arms)
    return ce and {"apgd-t", "fab-t", "square"} <= {record["name"] for record in arms}


def unresolved(bound: Strictness, spec: RunSpec) -> str:
    """Return the bound on the images that attacks not yet run on them would fool, as a sentence."""
    attacks = "AutoAttack's attacks" if has_autoattack(spec) else "the attacks marked * that were not run on them"
    in_full = f"{bound.in_full:,} of {bound.standing:,} robust images were given every attack"
    if bound.in_full == bound.standing:
        return f"unresolved: no image; {in_full}"
    images = f"at most {bound.images:,} image{'s' * (bound.images != 1)} ({fine(bound.bound)})"
    return (
        f"unresolved: with a probability of 95 %, {attacks} would fool {images if bound.images else 'no image'} "
        f"more, estimated from their gains on this model; {in_full}{_tested_by_scores(spec)}"
    )


def _tested_by_scores(spec: RunSpec) -> str:
    """Return what the test of a suite's arm `square` would have shown, as a clause; empty without this arm."""
    if not any(record.get("arm") and record["name"] == "square" for record in spec.suite):
        return ""
    return (
        f"; square was tested on {SCORE_TESTED} of them drawn at random, or on all: if it alone fooled a fifth or "
        "more, one of these shows it with a probability of 99.9 %"
    )


def _curve(curve: Curve) -> Table:
    """Return a table of the curve at some of its radii."""
    table = Table(box=None, pad_edge=False, header_style="", padding=(0, 3, 0, 0))
    shown = [index for index in SHOWN_RADII if index < len(curve.radii)]
    table.add_column("eps", no_wrap=True)
    for index in shown:
        table.add_column(f"{curve.radii[index]:.4g}", justify="right", no_wrap=True)
    table.add_row("robust acc", *(percent(curve.robust_accuracy[index].value) for index in shown))
    return table


def median(curve: Curve) -> str:
    """Return the median smallest fooling eps of the correctly classified images, as text."""
    value = curve.median
    if value is None:
        return "–"
    return f"{value:.4g}" if math.isfinite(value) else f"above {curve.radii[-1]:.4g}"


def passes(count: int, images: int) -> str:
    """Return a number of passes as `1,234 passes per image`."""
    return f"{count / images:,.0f} {PASSES}"


def flag_lines(flags: Sequence[Flag]) -> list[str]:
    """Return the lines about flags: their number, then for each its code, measured value, meaning and remedy."""
    lines = [f"\n{len(flags)} flag{'s' * (len(flags) > 1)}"] if flags else []
    for flag in flags:
        value = "" if flag.value is None else f"{flag.value:g} "
        lines += [f"  {flag.code}: {value}{flag.meaning}.", f"    → {flag.remedy}."]
    return lines


def percent(share: float) -> str:
    """Return 0.2695 as `27.0 %`."""
    return f"{100 * share:.1f} %"


def fine(share: float) -> str:
    """Return 0.0005 as `0.05 %`, 0 as `0 %`."""
    return f"{100 * share:.2g} %"


def interval(rate: Rate) -> str:
    """Return the ends of a rate's interval in percent."""
    return f"{100 * rate.low:.1f} – {100 * rate.high:.1f}"


def duration(seconds: float) -> str:
    """Return seconds as `0.4 s`, `12 s`, `1m40` or `2h05`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}"
