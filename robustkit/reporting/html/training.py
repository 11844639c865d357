"""The page about a training run, finished or not: one self-contained HTML file with its curves."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from robustkit.registry.decorators import ORIGIN
from robustkit.reporting.charts.lines import Chart, Series, count_marks
from robustkit.reporting.html.command import commands, field
from robustkit.reporting.html.render import render
from robustkit.reporting.terminal.evaluation import duration, interval, percent
from robustkit.reporting.terminal.training import flops_words, method_words
from robustkit.reporting.terminal.transfer import short_names
from robustkit.reporting.versions import made_in_parts
from robustkit.runs.report_parts import Rate
from robustkit.runs.training_record import Trained, TrainSpec

History = Sequence[Mapping[str, Any]]
ACCURACY = {
    "test_accuracy": "test accuracy",
    "best_member": "best member",
    "any_right": "any member right",
    "all_right": "all members right",
}
FOOLED = {"white_box": "attack on all members", "transfer": "images crafted on another member"}


def page(spec: TrainSpec, history: History, record: Trained | None) -> str:
    """Return the page; without a record the run is not finished, and the page shows the history so far."""
    return render("training.html", _facts(spec, history, record))


def _facts(spec: TrainSpec, history: History, record: Trained | None) -> dict[str, Any]:
    accuracy = Rate(**record.accuracy) if record and record.accuracy else None
    tested = str(spec.test["string"]).rpartition("/")[2] if spec.test else ""
    samples = list(record.samples) if record else []
    several = len(samples) if samples else spec.members
    return {
        "run_id": spec.run_id,
        "name": f"{spec.method['name']} on {_arch(spec)}",
        "method": method_words(spec.method).replace(",", ", "),
        "epochs": spec.epochs,
        "done": len(history),
        "finished": record is not None,
        "several": spec.members > 1,
        "number": f"{100 * accuracy.value:.1f}" if accuracy else "",
        "verdict": _verdict(accuracy, several, tested),
        "size": f"{spec.epochs} epochs, {spec.data['n']:,} images of {_file(spec.data)}, batch {spec.batch_size}",
        "cost": _cost(record, history),
        "members": ", ".join(percent(share) for share in record.member_accuracy) if record else "",
        "accuracy_chart": _shares(spec, history, ACCURACY),
        "fooled_chart": _shares(spec, history, FOOLED),
        "white_box": any("white_box" in facts for facts in history),
        "others": _other_charts(spec, history),
        "samples": [_sample(number, facts) for number, facts in enumerate(samples)],
        "following": _following(spec),
        **commands(record.environment if record else {}, command(spec)),
        "facts": _surroundings(spec, record),
        "version": (record.environment.get("versions", {}).get("robustkit") or "") if record else "",
    }


def command(spec: TrainSpec) -> str:
    """Return the shell command of a run."""
    words = ["robustkit", "train", str(spec.method.get("string", spec.method["name"]))]
    for name in spec.method:
        if name not in ("name", *ORIGIN):
            words += [f"--{name.replace('_', '-')}", field(spec.method, name)]
    words += ["--arch", str(spec.arch["string"]), "--data", str(spec.data["string"])]
    words += ["--limit", str(spec.data["n"])]
    words += ["--test", str(spec.test["string"])] if spec.test else []
    for name in ("epochs", "batch_size", "lr", "members", "ema", "augment", "seed", "precision"):
        words += [f"--{name.replace('_', '-')}", str(getattr(spec, name))]
    return shlex.join(words)


def _arch(spec: TrainSpec) -> str:
    name = short_names([str(spec.arch["string"])])[0]
    return f"{spec.members} x {name}" if spec.members > 1 and not name.startswith("ensemble:") else name


def _file(part: Mapping[str, Any]) -> str:
    return str(part["string"]).rpartition("/")[2]


def _verdict(accuracy: Rate | None, several: int, tested: str) -> str:
    if accuracy is None:
        return ""
    what = f"The mean of {several}" if several > 1 else "The net"
    ends = f"95 % interval {interval(accuracy)} %"
    return f"{what} classifies {percent(accuracy.value)} of {accuracy.n:,} images of {tested} correctly, {ends}."


def _cost(record: Trained | None, history: History) -> str:
    if record:
        return f"{flops_words(record.cost['flops'])}, {duration(record.cost['seconds'])}"
    return duration(history[-1]["seconds"]) if history else "–"


def _shares(spec: TrainSpec, history: History, names: Mapping[str, str]) -> Chart | None:
    return _chart(spec, history, names, percent_tick, low=0.0, high=1.0)


def _other_charts(spec: TrainSpec, history: History) -> list[tuple[str, Chart]]:
    """Return title and chart of loss, learning rate and gradient cosine, as far as they were measured."""
    losses = {"loss": "training", "test_loss": "test"}
    cosine = _chart(spec, history, {"cosine": "mean over pairs"}, "{:.2g}".format, high=1.0)
    charts = {
        "Loss": _chart(spec, history, losses, "{:.3g}".format),
        "Learning rate": _chart(spec, history, {"rate": "at the end of each epoch"}, "{:.3g}".format),
        "Cosine of members' gradients": cosine,
    }
    return [(title, chart) for title, chart in charts.items() if chart]


def _chart(
    spec: TrainSpec,
    history: History,
    names: Mapping[str, str],
    text: Callable[[float], str],
    low: float | None = None,
    high: float | None = None,
) -> Chart | None:
    """Return curves of these measurements over the epochs; None if none of them was made."""
    series = []
    for key, name in names.items():
        points = [(facts["epoch"] / spec.epochs, facts[key]) for facts in history if facts.get(key) is not None]
        if points:
            series.append(Series(name, points))
    return Chart(series, "epoch", count_marks(spec.epochs), text, low, high) if series else None


def percent_tick(share: float) -> str:
    """Return 0.5 as `50 %`, and 0.969 as `96.9 %`."""
    return f"{100 * share:.1f}".removesuffix(".0") + " %"


def _sample(number: int, facts: Mapping[str, Any]) -> list[str]:
    forms = {"cycle": "d", "epoch": "d", "rate": ".3g", "accuracy": ".1%", "loss": ".4f"}
    cells = ["–" if facts.get(key) is None else format(facts[key], form) for key, form in forms.items()]
    return [f"#{number}", *cells]


def _following(spec: TrainSpec) -> list[str]:
    data = shlex.quote(str(spec.test["string"])) if spec.test else "DATA"
    verbs = ["diversity", "evaluate"] if spec.members > 1 else ["evaluate"]
    return [f"robustkit {verb} DIR/ --data {data}" for verb in verbs]


def _surroundings(spec: TrainSpec, record: Trained | None) -> list[tuple[str, str]]:
    around = record.environment if record else {}
    weights = record.hashes.items() if record else ()
    named = {
        "run id": spec.run_id,
        "net": spec.arch["string"],
        "data": _hashed(spec.data["string"], spec.data["fingerprint"]),
        "test": _hashed(spec.test["string"], spec.test["fingerprint"]) if spec.test else "",
        "weights": ", ".join(_hashed(name, sha256) for name, sha256 in weights),
        "device": around.get("device_name") or around.get("device"),
        "platform": around.get("platform"),
        "commit": around.get("commit"),
        "versions": ", ".join(f"{name} {number}" for name, number in around.get("versions", {}).items() if number),
        "parts": made_in_parts(around),
    }
    return [(name, str(value)) for name, value in named.items() if value not in (None, "")]


def _hashed(name: object, sha256: object) -> str:
    return f"{name} (sha256 {str(sha256)[:12]}…)"
