"""Craft runs and matrices as tables for the terminal, and two craft runs side by side."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from rich.console import Console
from rich.table import Table

from robustkit.core.errors import UsageError
from robustkit.reporting.names import data_name
from robustkit.reporting.paired import mcnemar, newcombe
from robustkit.reporting.terminal.evaluation import duration, flag_lines, interval, percent
from robustkit.reporting.terminal.training import flops_words
from robustkit.reporting.versions import made_in_parts
from robustkit.runs.craft_record import Craft, Judgement, Matrix
from robustkit.runs.evaluation_record import Rate

FLOORS = "noise: random signs; swapped: another image's change; both of the same norm, success over the same n"


def short_names(strings: Sequence[str]) -> list[str]:
    """Return names that fit a table: of the weights file, run or net; the whole string where two agree."""
    names = [_short(string) for string in strings]
    return [name if names.count(name) == 1 else string for name, string in zip(names, strings, strict=True)]


def _short(string: str) -> str:
    head, mark, query = string.partition("?")
    source, _, rest = head.partition(":")
    name, at, weights = rest.partition("@")
    stem = PurePosixPath(weights).stem if at else name or _run_name(source)
    defense = re.search(r"(?:^|&)defense=([^&]+)", query) if mark else None
    return f"{stem}?{defense[1]}" if defense else stem


def _run_name(folder: str) -> str:
    """Return a run's folder, or the number of one of its nets behind it, without the folders above."""
    path, sign, number = folder.rpartition("#")
    return f"{PurePosixPath(path if sign else folder).name}{'/#' if sign else ''}{number if sign else ''}"


def attack_words(attack: Mapping[str, Any]) -> str:
    """Return an attack as it was asked for; of a recipe with techniques what it stands for as well."""
    string = str(attack["string"])
    name = "+".join(part["name"] for part in (attack, *attack["techniques"]))
    own = re.split(r"[(+]", string)[0] == attack["name"]
    return string if own or not attack["techniques"] else f"{string} = {name}"


def show(record: Craft, console: Console, next_command: str | None = None, page: object = None) -> None:
    """Print what was crafted, what it cost, what each model made of it, where the page is, the next command."""
    spec = record.spec
    strings = [one.model for one in (*record.surrogates, *record.targets)]
    names = short_names(strings)
    own, others = names[: len(record.surrogates)], names[len(record.surrogates) :]

    def line(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    data = data_name(spec.data["string"])
    line(f"run {record.run_id}   {record.n} images of {data}   {spec.threat}   seed {spec.seed}")
    attack = attack_words(spec.attack)
    goal = f"   targeted: {spec.targeted}" if spec.targeted else ""
    mixed = f"   combine {spec.combine}" if len(own) > 1 else ""
    line(f"{attack} on {', '.join(own)}{mixed}{goal}")
    line(
        f"{record.gradients_per_image:,.0f} gradients and {record.forwards_per_image:,.0f} forwards per image   "
        f"{duration(record.seconds)}"
    )
    if training := training_words(record, own):
        line(f"trained for {training}")
    if made := made_in_parts(record.environment):
        line(made)
    line("")
    table = Table(box=None, pad_edge=False, header_style="", padding=(0, 3, 0, 0))
    table.add_column("model", no_wrap=True)
    for column in ("clean acc", "success", "95% interval", "n", "noise", "swapped"):
        table.add_column(column, justify="right", no_wrap=True)
    for title, names_of, judgements in (
        ("surrogates", own, record.surrogates),
        ("targets", others, record.targets),
    ):
        if judgements:
            table.add_row(title, style="dim")
        for name, judged in zip(names_of, judgements, strict=True):
            table.add_row(f"  {name}", *_cells(judged))
    console.print(table, highlight=False)
    if record.targets:
        line(FLOORS)
    if record.not_finite:
        line(f"warning: the attack left {record.not_finite} images NaN or infinite; the clean ones stand for them")
    for text in flag_lines(record.flags):
        line(text)
    if record.budgets:
        line("")
        console.print(_budgets(record, others), highlight=False)
    if forecast := record.forecast:
        line(
            f"\nforecast for unseen models: {_share(forecast.expected)} expected, leaving out one surrogate each:"
        )
        line("  " + "   ".join(f"{name} {_rate(rate)}" for name, rate in zip(own, forecast.left_out, strict=True)))
        line(
            f"  95 % of models of their kind: {100 * forecast.low:.1f} – {percent(forecast.high)}   "
            f"{forecast.gradients_per_image:,.0f} gradients per image"
        )
    if png := record.png:
        told = [f"{name} {_rate(rate)}" for name, rate in zip(others, png.success, strict=False)]
        line(f"\npng      {png.folder}   largest change {png.largest_change} of 255 levels; the files as re-read:")
        line("         " + ("   ".join(told) or "no target"))
    if page or next_command:
        line("")
    if page:
        line(f"report   {page}")
    if next_command:
        line(f"next     {next_command}")


def training_words(record: Craft, names: Sequence[str]) -> str:
    """Return what the training of each surrogate cost, of those that are a run's folder."""
    costs = record.environment.get("training_flops") or []
    known = [(name, flops) for name, flops in zip(names, costs, strict=False) if flops]
    return "   ".join(f"{name} {flops_words(flops)}" for name, flops in known)


def _cells(judged: Judgement) -> list[str]:
    return [
        percent(judged.clean_accuracy),
        _rate(judged.rate),
        "–" if judged.rate is None else interval(judged.rate),
        str(judged.n),
        _share(judged.noise),
        _share(judged.transplant),
    ]


def _budgets(record: Craft, names: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="", padding=(0, 3, 0, 0))
    table.add_column("budget", justify="right", no_wrap=True)
    for column in ("gradients", "steps", *names):
        table.add_column(column, justify="right", no_wrap=True)
    for point in record.budgets or ():
        if point.steps is None:
            table.add_row(f"{point.budget:,}", "one step costs more")
            continue
        rates = [_rate(rate) for rate in point.success]
        table.add_row(f"{point.budget:,}", f"{point.gradients_per_image or 0:,.0f}", f"{point.steps}", *rates)
    return table


def show_matrix(record: Matrix, console: Console, page: object = None, next_command: str | None = None) -> None:
    """Print the matrix: a row for each model crafted on, a column for each judged on."""

    def line(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    data = data_name(record.data["string"])
    names = short_names([*record.models, *record.targets])
    line(f"matrix {record.run_id}   {record.n} images of {data}   {record.threat}   seed {record.seed}")
    line(f"{attack_words(record.attack)}   success in % over the images that the column classifies correctly\n")
    table = Table(box=None, pad_edge=False, header_style="", padding=(0, 2, 0, 0))
    table.add_column("crafted on", no_wrap=True)
    for name in (*names, "grads"):
        table.add_column(name, justify="right", no_wrap=True)
    for place, (row, spent) in enumerate(zip(record.success, record.gradients_per_image, strict=True)):
        cells = [_number(rate) + ("*" if column == place else "") for column, rate in enumerate(row)]
        table.add_row(names[place], *cells, f"{spent:,.0f}")
    table.add_row("any of them", *[_number(rate) for rate in record.worst], "")
    table.add_row("random signs", *[_number_of(share) for share in record.noise], "0", style="dim")
    table.add_row("clean acc", *[_number_of(share) for share in record.clean_accuracy], "", style="dim")
    console.print(table, highlight=False)
    line("* crafted on this very model; any of them: images that any row but a model's own fools it with")
    line("grads: gradients per image")
    for text in flag_lines(record.flags):
        line(text)
    if page:
        line(f"\nreport   {page}")
    if next_command:
        line(f"next     {next_command}")


@dataclass(frozen=True)
class Difference:
    """What two craft runs did to one model, over the `n` images that it classified correctly.

    `value` is A's success minus B's with its 95 % interval; `p` is McNemar's exact, two-sided; `only_a` and
    `only_b` are the images that A alone, or B alone, fooled it with.
    """

    model: str
    n: int
    value: float
    low: float
    high: float
    p: float
    only_a: list[int]
    only_b: list[int]


def differences(a: Craft, b: Craft) -> list[Difference]:
    """Return the differences on the models that both runs were judged on; UsageError if there are none."""
    others = {judged.fingerprint: judged for judged in b.targets}
    pairs = [(judged, others[judged.fingerprint]) for judged in a.targets if judged.fingerprint in others]
    if not pairs:
        raise UsageError(
            "the two runs were judged on no model in common; judge both with robustkit transfer --target."
        )
    found = []
    for first, second in pairs:
        hits = list(zip(first.fooled(a.labels, a.goals), second.fooled(b.labels, b.goals), strict=True))
        right = [(place, x, y) for place, (x, y) in enumerate(hits) if x is not None and y is not None]
        if not right:
            continue
        only_a = [place for place, x, y in right if x and not y]
        only_b = [place for place, x, y in right if y and not x]
        both = sum(bool(x and y) for _, x, y in right)
        low, high = newcombe(both, len(only_a), len(only_b), len(right))
        value = (len(only_a) - len(only_b)) / len(right)
        p = mcnemar(len(only_a), len(only_b))
        found.append(Difference(first.model, len(right), value, low, high, p, only_a, only_b))
    return found


def _rate(rate: Rate | None) -> str:
    return "–" if rate is None else percent(rate.value)


def _share(share: float | None) -> str:
    return "–" if share is None else percent(share)


def _number(rate: Rate | None) -> str:
    return _number_of(None if rate is None else rate.value)


def _number_of(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"
