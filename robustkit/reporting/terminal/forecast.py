"""A cost forecast as a table for the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from robustkit.reporting.names import data_name
from robustkit.reporting.terminal.evaluation import duration, percent
from robustkit.runs.forecast_record import Estimate, Plan, Scale

# What takes time beside full batches of the attacks, by the keys of `Scale.shares`.
OVERHEADS = {
    "passes": "batches that are not full",
    "start": "start-up",
    "clean": "the clean pass",
    "driver": "the driver process",
    "tail": "the slowest images",
}
# A smaller share of the time is not printed.
MIN_OVERHEAD = 0.1
DAY_SECONDS = 24 * 3600


def show(plan: Plan, console: Console, next_command: str) -> None:
    """Print what was measured, a row for each number of devices, and the next command."""

    def line(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    data = data_name(plan.data)
    device = plan.environment["device_name"]
    line(
        f"plan   {plan.n:,} image{'s' * (plan.n != 1)} of {data}   {plan.threat}   {plan.suite}   seed {plan.seed}"
        f"   {device}\n"
    )
    for text in measured(plan):
        line(text)
    table = Table(box=None, pad_edge=False, header_style="", padding=(0, 3, 0, 0))
    what = "device-hours" if plan.price is None else "cost"
    for name in ("devices", "time", "95% interval", what, "95% interval", "efficiency"):
        table.add_column(name, justify="right", no_wrap=True)
    for scale in plan.scales:
        table.add_row(*_row(scale))
    line("")
    console.print(table, highlight=False)
    overheads = [text for scale in plan.scales if (text := overhead(scale))]
    for text in ["", *overheads] if overheads else []:
        line(text)
    line(f"\nnext     {next_command}")


def measured(plan: Plan) -> list[str]:
    """Return the measurements as lines of text."""
    trial, speed, spent = plan.trial, plan.speed, plan.propagations
    unfinished = "" if trial.through == trial.images else f", {trial.images - trial.through} not finished in time"
    attacks = "all attacks" if plan.arms is None else "the attacks that they were given"
    arms = "" if plan.arms is None else f"; {number(plan.arms.value)} ({interval(plan.arms)}) of them by the arms"
    most = "" if plan.most is None else f", at most {plan.most:,}"
    return [
        f"sample   {trial.images:,} images drawn at random, attacked for {duration(trial.seconds)}: "
        f"{trial.robust:,} robust against {attacks}{unfinished}",
        f"cost     {number(spent.value)} passes per image ({interval(spent)}){most}{arms}",
        f"speed    {milliseconds(speed.forward)} per image forward, {milliseconds(speed.both)} with backward, "
        f"batches of {speed.at_once}, {speed.precision}",
        f"memory   {size(plan.memory.peak)} per device, {size(plan.memory.held)} before the attacks",
    ]


def overhead(scale: Scale) -> str:
    """Return what takes most time beside full batches of the attacks, as text; empty if it is little."""
    share = scale.shares[scale.bound]
    if share < MIN_OVERHEAD:
        return ""
    plural = "s" * (scale.devices > 1)
    return f"{scale.devices:,} device{plural}: {percent(share)} of the time is spent on {OVERHEADS[scale.bound]}"


def _row(scale: Scale) -> list[str]:
    spent = scale.money or scale.device_hours
    return [
        f"{scale.devices:,}",
        span(scale.seconds.value),
        f"{span(scale.seconds.low)} – {span(scale.seconds.high)}",
        number(spent.value),
        interval(spent),
        percent(min(scale.efficiency, 1.0)),
    ]


def interval(estimate: Estimate) -> str:
    """Return the ends of an interval."""
    return f"{number(estimate.low)} – {number(estimate.high)}"


def span(seconds: float) -> str:
    """Return seconds as `1m40`, from two days up as `3.4 days`."""
    return duration(seconds) if seconds < 2 * DAY_SECONDS else f"{seconds / DAY_SECONDS:,.1f} days"


def number(value: float) -> str:
    """Return a number with two significant digits below 10: `0.0012`, `0.34`, `5.6`, `1,235`."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def milliseconds(seconds: float) -> str:
    """Return seconds as `0.41 ms`."""
    return f"{number(1000 * seconds)} ms"


def size(count: int) -> str:
    """Return bytes as `312 MB` or `4.1 GB`."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
