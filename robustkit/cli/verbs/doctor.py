"""`robustkit doctor`: checks of a model, or a test of the machine against distances in closed form."""

from __future__ import annotations

import json

from rich.table import Table

from robustkit.api.options.runs import DoctorFlags
from robustkit.cli.inputs import Inputs
from robustkit.cli.output import result_console
from robustkit.cli.streams import print_result
from robustkit.cli.verbs import factsheet
from robustkit.core.devices import pick_device
from robustkit.core.errors import UsageError
from robustkit.diagnostics.device_selftest import closed_form, speeds
from robustkit.diagnostics.doctor import examine
from robustkit.reporting.sentences import counted
from robustkit.reporting.terminal.evaluation import duration, flag_lines, percent
from robustkit.runs.environment import environment
from robustkit.runs.evaluation_record import CHANCE
from robustkit.runs.spec import dumps

IMAGES = 64


def doctor(flags: DoctorFlags) -> int:
    """Run the verb; return 0, or 1 if the machine gives false verdicts."""
    given = {"--data": flags.data, "--limit": flags.limit, "--threat": flags.threat}
    named = [flag for flag, value in given.items() if value is not None]
    if flags.aggregator is not None:
        return factsheet.show(flags, [*(["MODEL"] if flags.model else []), *named])
    if flags.model is None:
        if named:
            raise UsageError(
                f"{named[0]} without a model; use robustkit doctor MODEL …, or leave it out to test the machine."
            )
        return _machine(str(flags.device), flags.json)
    inputs = Inputs.load(flags, flags.model, largest=IMAGES)
    diagnosis = examine(inputs.model, inputs.samples, inputs.threat, inputs.device)
    if flags.json:
        print_result(json.dumps(json.loads(dumps(diagnosis)), indent=2))
        return 0
    console = result_console()

    def line(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    line(diagnosis.model)
    line(f"{diagnosis.parameters:,} parameters, {diagnosis.classes} classes")
    line(
        f"clean accuracy {percent(diagnosis.correct / diagnosis.n)} on {counted(diagnosis.n)} of {diagnosis.data}"
    )
    if any(flag.code == CHANCE for flag in diagnosis.flags):
        line(
            f"gradients were checked only on the {counted(diagnosis.correct)} that the model classifies correctly"
        )
    for text in flag_lines(diagnosis.flags):
        line(text)
    if not diagnosis.flags:
        line("no flag raised: no reason found to distrust an evaluation")
    spent = diagnosis.cost.forwards + diagnosis.cost.backwards
    line(f"\n{spent:,} propagations, {duration(diagnosis.cost.seconds)}")
    return 0


def _machine(device: str, as_json: bool) -> int:
    target = pick_device(device)
    surroundings = environment(target, "fp32", None)
    trials, rates = closed_form(target), speeds(target)
    false = sum(trial.false for trial in trials)
    if as_json:
        body = {"environment": surroundings, "closed_form": trials, "speeds": rates}
        print_result(json.dumps(json.loads(dumps(body)), indent=2))
        return int(false > 0)
    console = result_console()
    for name, version in surroundings["versions"].items():
        console.print(f"{name:<14}{version or 'not installed'}", highlight=False)
    console.print(f"{'device':<14}{target}   {surroundings['device_name']}", highlight=False)
    console.print(f"{'threads':<14}{surroundings['threads']}\n", highlight=False)
    table = Table(box=None, pad_edge=False, header_style="", padding=(0, 3, 0, 0))
    table.add_column("verdicts against closed form", no_wrap=True)
    for name in ("images", "robust by theory", "found robust", "false", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for trial in trials:
        numbers = (trial.images, trial.expected, trial.found, trial.false)
        table.add_row(f"linear net, {trial.threat}", *map(str, numbers), duration(trial.seconds))
    console.print(table, highlight=False)
    for rate in rates:
        console.print(
            f"forward and input gradient, {rate.precision}: {rate.images_per_second:,.0f} images/s "
            "of the built-in net",
            highlight=False,
        )
    console.print("\nall verdicts true" if not false else f"\n{false} false verdicts: do not trust this machine")
    return int(false > 0)
