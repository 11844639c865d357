"""`robustkit compare`: two runs on the same images, side by side."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from robustkit.api.options.runs import CompareFlags
from robustkit.cli.output import result_console, wide_console
from robustkit.cli.streams import print_result
from robustkit.core.errors import UsageError
from robustkit.core.schema import FORMAT
from robustkit.reporting import paired_distances, sentences
from robustkit.reporting.paired import Comparison
from robustkit.reporting.paired import compare as pair
from robustkit.reporting.paired_distances import compare_distances
from robustkit.reporting.quantiles import ends, length
from robustkit.reporting.terminal.evaluation import interval, percent
from robustkit.reporting.terminal.transfer import differences, short_names
from robustkit.runs import run_folder
from robustkit.runs.evaluation_record import Report

FIRST = 20
METHOD = "Newcombe's score interval for paired proportions (1998, method 10)"


def compare(flags: CompareFlags) -> int:
    """Run the verb; UsageError for runs on different data."""
    a, b, as_json = flags.a, flags.b, flags.json
    if run_folder.is_craft(a) and run_folder.is_craft(b):
        return _crafts(a, b, as_json)
    first, second = run_folder.read_report(a), run_folder.read_report(b)
    if first.spec.data["fingerprint"] != second.spec.data["fingerprint"]:
        raise UsageError(
            f"{a} and {b} are runs on different data ({sentences.images(first)} of "
            f"{sentences.data_name(first)} and "
            f"{sentences.images(second)} of {sentences.data_name(second)}); compare runs on the same images."
        )
    if first.minimum or second.minimum:
        return _minimums((a, first), (b, second), as_json)
    found = pair(first, second)
    warnings = _warnings(first, second)
    if as_json:
        print_result(json.dumps(_document((a, first), (b, second), found, warnings), indent=2))
        return 0
    console = result_console()

    def line(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    for name, folder, report in (("A", a, first), ("B", b, second)):
        rate = report.robust_accuracy
        number = f"{percent(rate.value):>7}  {f'({interval(rate)})':<13}"
        line(f"{name}  {number}   {sentences.model_name(report)}   {folder}")
    line(f"\nthe same {found.n:,} image{'s' * (found.n != 1)}, {first.spec.threat}")
    for warning in warnings:
        line(f"warning      {warning}")
    line(
        f"difference   A − B = {points(found.difference)} points, 95 % interval {points(found.low)} to "
        f"{points(found.high)}"
    )
    line(f"             {METHOD}")
    line(f"McNemar      exact two-sided p = {found.p:.3g}")
    line(f"not robust in A only   {_listed(found.only_a)}")
    line(f"not robust in B only   {_listed(found.only_b)}")
    return 0


def _minimums(a: tuple[Path, Report], b: tuple[Path, Report], as_json: bool) -> int:
    """Compare two runs for minimum norms."""
    found = compare_distances(a[1], b[1])
    warnings = _warnings(a[1], b[1])
    if as_json:
        body = {"n": found.n, "difference": {**asdict(found.difference), "method": paired_distances.METHOD}}
        body |= {"a_farther": found.farther_a, "b_farther": found.farther_b, "equal": found.equal}
        sides = {"a": _side(*a), "b": _side(*b)}
        document = {"format": FORMAT, **sides, **body, "sign_test_p": found.p, "warnings": warnings}
        print_result(json.dumps(document, indent=2))
        return 0
    console = result_console()

    def line(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    for name, (folder, report) in (("A", a), ("B", b)):
        if report.minimum:
            middle = report.minimum.median
            number = f"median {length(middle.value)}  ({ends(middle)})"
            line(f"{name}  {number}   {sentences.model_name(report)}   {folder}")
    line(f"\nthe same {found.n:,} image{'s' * (found.n != 1)}, {a[1].spec.threat}")
    for warning in warnings:
        line(f"warning      {warning}")
    line(f"difference   A − B = {length(found.difference.value)}, 95 % interval {ends(found.difference)}")
    line(f"             {paired_distances.METHOD}")
    line(f"sign test    exact two-sided p = {found.p:.3g}")
    line(f"farther in A {found.farther_a:,}; farther in B {found.farther_b:,}; equal {found.equal:,}")
    return 0


def _crafts(a: Path, b: Path, as_json: bool) -> int:
    """Compare two craft runs on every model that both were evaluated on."""
    first, second = run_folder.read_craft(a), run_folder.read_craft(b)
    if first.spec.data["fingerprint"] != second.spec.data["fingerprint"]:
        raise UsageError(f"{a} and {b} are crafted from different data; compare runs on the same images.")
    if first.goals != second.goals:
        raise UsageError(f"{a} and {b} aim at different classes; compare runs with the same --targeted.")
    found = differences(first, second)
    warnings = []
    if first.spec.threat != second.spec.threat:
        warnings.append(f"the threats differ: {first.spec.threat} for A, {second.spec.threat} for B.")
    if first.gradients_per_image != second.gradients_per_image:
        spent = [f"{run.gradients_per_image:,.0f}" for run in (first, second)]
        warnings.append(f"the gradients per image differ: {spent[0]} for A, {spent[1]} for B.")
    if as_json:
        sides = {
            name: {"folder": str(folder), "run_id": run.run_id, "attack": dict(run.spec.attack)}
            for name, folder, run in (("a", a, first), ("b", b, second))
        }
        body = {"format": FORMAT, **sides, "method": METHOD, "targets": [asdict(one) for one in found]}
        print_result(json.dumps({**body, "warnings": warnings}, indent=2))
        return 0
    console = wide_console()
    for name, folder, run in (("A", a, first), ("B", b, second)):
        cost = f"{run.gradients_per_image:,.0f} gradients per image"
        on = f"{len(run.surrogates)} surrogate{'s' * (len(run.surrogates) > 1)}"
        mixed = f" ({run.spec.combine})" if len(run.surrogates) > 1 else ""
        line = f"{name}   {run.spec.attack_name} on {on}{mixed}   {cost}   {folder}"
        console.print(line, highlight=False, soft_wrap=True)
    for warning in warnings:
        console.print(f"warning   {warning}", highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="", padding=(0, 3, 0, 0))
    table.add_column("\ntarget", no_wrap=True)
    for column in ("A − B, points", "95% interval", "n", "only A", "only B", "McNemar p"):
        table.add_column(f"\n{column}", justify="right", no_wrap=True)
    for label, one in zip(short_names([one.model for one in found]), found, strict=True):
        ends = f"{points(one.low)} to {points(one.high)}"
        alone = (str(len(one.only_a)), str(len(one.only_b)))
        table.add_row(label, points(one.value), ends, str(one.n), *alone, f"{one.p:.3g}")
    console.print(table, highlight=False)
    return 0


def points(share: float) -> str:
    """Return a difference of shares in percentage points with its sign, such as `+2.3`, `−0.8` or `0.0`."""
    text = f"{100 * share:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def _warnings(first: Report, second: Report) -> list[str]:
    found = []
    if first.spec.threat != second.spec.threat:
        found.append(
            f"the threats differ: {first.spec.threat} for A, {second.spec.threat} for B; "
            "the difference is not the models' alone."
        )
    elif first.spec.suite != second.spec.suite:
        found.append("the attacks differ, so the difference is not the models' alone.")
    return found


def _listed(indices: list[int]) -> str:
    if not indices:
        return "no image"
    named = ", ".join(map(str, indices[:FIRST]))
    more = f" and {len(indices) - FIRST:,} more" if len(indices) > FIRST else ""
    return f"{len(indices):,} image{'s' * (len(indices) > 1)}: {named}{more}"


def _side(folder: Path, report: Report) -> dict[str, object]:
    return {
        "folder": str(folder),
        "run_id": report.run_id,
        "model": report.spec.model["string"],
        "threat": report.spec.threat,
    } | ({"median": asdict(report.minimum.median)} if report.minimum else {})


def _document(
    a: tuple[Path, Report], b: tuple[Path, Report], found: Comparison, warnings: list[str]
) -> dict[str, object]:
    return {
        "format": FORMAT,
        "a": _side(*a) | {"robust_accuracy": vars(a[1].robust_accuracy)},
        "b": _side(*b) | {"robust_accuracy": vars(b[1].robust_accuracy)},
        "n": found.n,
        "difference": {"value": found.difference, "low": found.low, "high": found.high, "method": METHOD},
        "mcnemar_p": found.p,
        "only_a_loses": {"count": len(found.only_a), "first": found.only_a[:FIRST]},
        "only_b_loses": {"count": len(found.only_b), "first": found.only_b[:FIRST]},
        "warnings": warnings,
    }
