"""Craft runs and transfer matrices as tables for the terminal, and the paired comparison of two craft runs."""

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
from robustkit.runs.report_parts import Rate

CONTROLS = (
    "controls, of the same norm and over the same n: random signs, and another image's perturbation (other image)"
)


def short_names(strings: Sequence[str]) -> list[str]:
    """Return short names of models: weights file, run folder or architecture; the whole string if two agree."""
    names = [_short(string) for string in strings]
    return [name if names.count(name) == 1 else string for name, string in zip(names, strings, strict=True)]


def _short(string: str) -> str:
    head, mark, query = string.partition("?")
    source, _, rest = head.partition(":")
    name, separator, weights = rest.partition("@")
    stem = PurePosixPath(weights).stem if separator else name or _run_name(source)
    defense = re.search(r"(?:^|&)defense=([^&]+)", query) if mark else None
    return f"{stem}?{defense[1]}" if defense else stem


def _run_name(folder: str) -> str:
    """Return the name of a run's folder, with the number of its member if it has one, without parent folders."""
    path, sign, number = folder.rpartition("#")
    return f"{PurePosixPath(path if sign else folder).name}{'/#' if sign else ''}{number if sign else ''}"


def attack_words(attack: Mapping[str, Any]) -> str:
    """Return an attack's string; for a recipe followed by the attack and techniques that it names."""
    string = str(attack["string"])
    name = "+".join(part["name"] for part in (attack, *attack["techniques"]))
    own = re.split(r"[(+]", string)[0] == attack["name"]
    return string if own or not attack["techniques"] else f"{string} = {name}"


def show(record: Craft, console: Console, next_command: str | None = None, page: object = None) -> None:
    """Print attack, cost, success on each model, flags, where the page is, and the next command."""
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
    if training := training_costs(record, own):
        line(f"training cost: {training}")
    if versions := made_in_parts(record.environment):
        line(versions)
    line("")
    console.print(_judged_models(record, own, others), highlight=False)
    if record.targets:
        line(CONTROLS)
    if record.not_finite:
        line(
            f"warning: the attack returned NaN or infinity for {record.not_finite} images; their clean images are "
            "used instead"
        )
    for text in flag_lines(record.flags):
        line(text)
    if record.budgets:
        line("")
        console.print(_budgets(record, others), highlight=False)
    if forecast := record.forecast:
        line(f"\nforecast for unseen models: {_share(forecast.expected)} expected, by leaving out each surrogate:")
        line("  " + "   ".join(f"{name} {_rate(rate)}" for name, rate in zip(own, forecast.left_out, strict=True)))
        line(
            f"  95 % of models like these: {100 * forecast.low:.1f} – {percent(forecast.high)}   "
            f"{forecast.gradients_per_image:,.0f} gradients per image"
        )
    if png := record.png:
        rates = [f"{name} {_rate(rate)}" for name, rate in zip(others, png.success, strict=False)]
        line(f"\npng      {png.folder}   largest change {png.largest_change} of 255 levels; success of the files:")
        line("         " + ("   ".join(rates) or "no target"))
    if page or next_command:
        line("")
    if page:
        line(f"report   {page}")
    if next_command:
        line(f"next     {next_command}")


def _judged_models(record: Craft, own: Sequence[str], others: Sequence[str]) -> Table:
    """Return the table of the success on each surrogate and each target, by their short names."""
    table = Table(box=None, pad_edge=False, header_style="", padding=(0, 2, 0, 0))
    table.add_column("model", no_wrap=True)
    for column in ("clean acc", "success", "95% interval", "n", "random signs", "other image"):
        table.add_column(column, justify="right", no_wrap=True)
    for title, model_names, judgements in (
        ("surrogates", own, record.surrogates),
        ("targets", others, record.targets),
    ):
        if judgements:
            table.add_row(title, style="dim")
        for name, judged in zip(model_names, judgements, strict=True):
            table.add_row(f"  {name}", *_cells(judged))
    return table


def training_costs(record: Craft, names: Sequence[str]) -> str:
    """Return the training cost of each surrogate that is a training run's folder."""
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
    """Print the matrix: a row for each surrogate, a column for each target."""

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
    for index, (row, spent) in enumerate(zip(record.success, record.gradients_per_image, strict=True)):
        cells = [_number(rate) + ("*" if column == index else "") for column, rate in enumerate(row)]
        table.add_row(names[index], *cells, f"{spent:,.0f}")
    table.add_row("any other row", *[_number(rate) for rate in record.worst], "")
    table.add_row("random signs", *[_percentage(share) for share in record.noise], "0", style="dim")
    table.add_row("clean acc", *[_percentage(share) for share in record.clean_accuracy], "", style="dim")
    console.print(table, highlight=False)
    line("* crafted on the model itself; any other row: fooled by the images of any other row")
    line("grads: gradients per image")
    for text in flag_lines(record.flags):
        line(text)
    if page:
        line(f"\nreport   {page}")
    if next_command:
        line(f"next     {next_command}")


@dataclass(frozen=True)
class Difference:
    """The difference in success of two craft runs on one target model.

    Attributes:
        model: the target's model string.
        n: images that the target classifies correctly.
        value: A's success minus B's, a share, with `low` and `high`, the ends of its 95 % interval.
        p: of McNemar's exact two-sided test.
        only_a: positions of the images that fooled the target only in run A.
        only_b: likewise in run B.
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
    """Return the difference on each target model of both runs.

    Raises:
        UsageError: if the runs have no target model in common.
    """
    others = {judged.fingerprint: judged for judged in b.targets}
    pairs = [(judged, others[judged.fingerprint]) for judged in a.targets if judged.fingerprint in others]
    if not pairs:
        raise UsageError(
            "the two runs have no target model in common; evaluate both with robustkit transfer --target."
        )
    found = []
    for first, second in pairs:
        fooled = list(zip(first.fooled(a.labels, a.goals), second.fooled(b.labels, b.goals), strict=True))
        correct = [(index, x, y) for index, (x, y) in enumerate(fooled) if x is not None and y is not None]
        if not correct:
            continue
        only_a = [index for index, x, y in correct if x and not y]
        only_b = [index for index, x, y in correct if y and not x]
        both = sum(bool(x and y) for _, x, y in correct)
        low, high = newcombe(both, len(only_a), len(only_b), len(correct))
        value = (len(only_a) - len(only_b)) / len(correct)
        p = mcnemar(len(only_a), len(only_b))
        found.append(Difference(first.model, len(correct), value, low, high, p, only_a, only_b))
    return found


def _rate(rate: Rate | None) -> str:
    return "–" if rate is None else percent(rate.value)


def _share(share: float | None) -> str:
    return "–" if share is None else percent(share)


def _number(rate: Rate | None) -> str:
    return _percentage(None if rate is None else rate.value)


def _percentage(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"
