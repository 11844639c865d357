"""Passes, CPU seconds and flags of the checks that precede an evaluation, on nets and on masked defenses.

    python scripts/benchmarks/checks_cost.py [--zoo ZOO --mnist FILE.npz --cifar FILE.npz] [--models FOLDER] \
        [--masks open|aside] [--half open|held-out] [--only REGEX] [--images 64] [--each] --record FILE
    python scripts/benchmarks/checks_cost.py --compare BEFORE AFTER

The first form runs the clean pass and the checks of the default suite as `evaluate` does, and records the checks'
passes, CPU seconds and raised flags, a line of JSON for each model; with --each also those of each check. It uses
the robustkit on the PYTHONPATH, so that an older checkout is measured by the same script. The nets are those of
scripts/reproductions/train_zoo.py (ZOO), of the folder of CIFAR-10 ResNets (--models) and the built-in net of
digits. The masks are those of tests/masked_defenses.py (--masks open) and of the two halves of
tests/known_masks.py, around nets of digits at linf 0.15.

The second form prints both records side by side, and which flags only one of them has. A pass is one image that
goes forward or backward through the model.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "reproductions"))
sys.path.append(str(Path(__file__).parents[2] / "tests"))
sys.path.append(str(Path(__file__).parent))

from robustkit import load_model
from robustkit.checks import run as checks
from robustkit.core.isolation import evaluation_mode, threads
from robustkit.core.threat import ThreatModel
from robustkit.data import load_data
from robustkit.data.samples import Samples
from robustkit.engine.evaluation.block_runner import BlockRunner
from robustkit.engine.evaluation.results import RunResults
from robustkit.engine.evaluation.run import Evaluation
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.engine.progress import Progress
from robustkit.models import as_classifier
from robustkit.runs.ledger import Ledger

Row = dict[str, Any]
# A model, images, a threat.
Subject = tuple[nn.Module, Samples, str]
RESNETS = {"resnet20": "2/255", "resnet56": "8/255", "resnet20-at": "8/255", "resnet32-at": "8/255"}


def measured(name: str, subject: Subject, each: bool) -> Row:
    """Return what the checks of one model cost and found."""
    net, samples, threat = subject
    model = as_classifier(net)
    run = Evaluation(model, samples, ThreatModel.parse(threat))
    results = RunResults.of(len(samples), run.spec.suite)
    with Ledger.open(None, run.spec.run_id) as ledger, evaluation_mode(model):
        instrumented = InstrumentedModel(model, torch.device("cpu"), "fp32")
        runner = BlockRunner(samples, run.settings, ledger, results, instrumented, Progress())
        runner.prepare()
        seconds, by_check = [0.0], dict[str, list[float]]()
        check, listed = runner._check, checks.BEFORE_ATTACKS

        def timed(*arguments: Any) -> Any:
            begun = time.process_time()
            found = check(*arguments)
            seconds[0] += time.process_time() - begun
            return found

        runner._check = timed  # type: ignore[method-assign, assignment]
        if each:
            checks.BEFORE_ATTACKS = tuple(_noting(one, by_check) for one in listed)  # type: ignore[assignment]
        try:
            with threads(1):
                runner.run_clean(results.scope)
        finally:
            checks.BEFORE_ATTACKS = listed
    values = {flag.code: flag.value for flag in results.passed.values()}
    return {
        "name": name,
        "threat": threat,
        "images": len(samples),
        "forwards": results.checks.forwards,
        "backwards": results.checks.backwards,
        "seconds": round(seconds[0], 2),
        "flags": {code: flag.value for code, flag in sorted(results.flags.items())},
        "passed": values,
        "each": {code: [round(value, 3) for value in spent] for code, spent in by_check.items()},
    }


def _noting(check: Callable[..., Any], spent: dict[str, list[float]]) -> Callable[..., Any]:
    """Return the check, which adds its forwards, backwards and CPU seconds to `spent`."""

    def noted(probe: Any) -> Any:
        model = probe.model
        before = model.forwards, model.backwards, time.process_time()
        flag = check(probe)
        after = model.forwards, model.backwards, time.process_time()
        spent[check.__name__] = [b - a for a, b in zip(before, after, strict=True)]
        return flag

    return noted


def nets(given: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Subject]]]:
    """Yield the names of the nets without a mask, and how to load each with its images."""
    from train_zoo import ZOO, held_out

    digits = load_data("digits:test")
    files = {"digits": digits}
    for data in ("mnist", "cifar"):
        if path := getattr(given, data):
            files[data] = load_data(str(path))

    def loaded(text: str, data: str, threat: str) -> Subject:
        return load_model(text, trust_code=True), files[data].head(given.images), threat

    if given.half != "held-out":
        yield "digits default", partial(loaded, "robustkit:digits-cnn", "digits", "linf:0.1")
    if given.models and "cifar" in files:
        for name, eps in RESNETS.items():
            if given.half is None or (given.half == "open") == (name in ("resnet20", "resnet20-at")):
                text = f"robustkit:cifar-{name.removesuffix('-at')}@{given.models / name}.safetensors"
                yield name, partial(loaded, text, "cifar", f"linf:{eps}")
    aside = held_out()
    for entry in ZOO:
        folder = given.zoo and given.zoo / entry.name
        wanted = given.half is None or (given.half == "held-out") == (entry.name in aside)
        if folder and wanted and entry.data in files:
            yield entry.name, partial(loaded, f"{folder}/", entry.data, entry.threat)


def masks(given: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Subject]]]:
    """Yield the names of the masked defenses, and how to make each."""
    import gauntlet
    import known_masks

    digits = load_data("digits:test").head(given.images)
    known = {*known_masks.AROUND, *known_masks.LEARNED}

    def made(make: Callable[[], Any]) -> Subject:
        return make()[0].defense, digits, "linf:0.15"

    for name, make in gauntlet.small().items():
        aside = name in known and known_masks.kept_aside(name)
        if aside == (given.masks == "aside"):
            yield f"mask: {name}", partial(made, make)


def compare(before: Path, after: Path) -> Iterator[str]:
    """Yield lines of Markdown: both records of each model in them, and the flags that only one of them has."""
    old, new = ({row["name"]: row for row in map(json.loads, path.open())} for path in (before, after))
    yield "| model | passes before | now | CPU s before | now | flags before | only now | only before |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, row in new.items():
        if name not in old:
            continue
        was = old[name]
        passes = [one["forwards"] + one["backwards"] for one in (was, row)]
        here, there = set(row["flags"]), set(was["flags"])
        found = [", ".join(sorted(codes)) or "–" for codes in (there, here - there, there - here)]
        cells = [name, *map("{:,}".format, passes), was["seconds"], row["seconds"], *found]
        yield f"| {' | '.join(map(str, cells))} |"
    shared = [(old[name], row) for name, row in new.items() if name in old]
    for kind, wanted in (("nets", False), ("masks", True)):
        pairs = [pair for pair in shared if pair[0]["name"].startswith("mask: ") == wanted]
        if pairs:
            spent = [
                sorted(one["forwards"] + one["backwards"] for one in side) for side in zip(*pairs, strict=True)
            ]
            cpu = [sum(one["seconds"] for one in side) for side in zip(*pairs, strict=True)]
            yield ""
            yield (
                f"{len(pairs)} {kind}: passes before {spent[0][len(pairs) // 2]:,} (median) and {spent[0][-1]:,} "
                f"(most), now {spent[1][len(pairs) // 2]:,} and {spent[1][-1]:,}; CPU seconds in all {cpu[0]:.0f} "
                f"and {cpu[1]:.0f}"
            )


def main() -> None:
    """Measure the models that are chosen, or compare two records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path)
    parser.add_argument("--mnist", type=Path)
    parser.add_argument("--cifar", type=Path)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--masks", choices=["open", "aside"])
    parser.add_argument("--half", choices=["open", "held-out"], help="of the nets")
    parser.add_argument("--only", default="", help="a regular expression that names must match")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--each", action="store_true", help="print a line for each check that costs a pass")
    parser.add_argument("--record", type=Path, help="a file that each row is added to, a line of JSON")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"))
    given = parser.parse_args()
    if given.compare:
        print("\n".join(compare(*given.compare)))
        return
    torch.set_num_threads(1)
    for name, make in masks(given) if given.masks else nets(given):
        if not re.search(given.only, name):
            continue
        row = measured(name, make(), given.each)
        print(
            f"{name:36} {row['forwards']:6} forwards {row['backwards']:6} backwards {row['seconds']:7.2f} s  "
            f"{', '.join(row['flags'])}",
            flush=True,
        )
        for check, (forwards, backwards, seconds) in row["each"].items():
            if forwards:
                print(f"    {check:32} {forwards:6.0f} forwards {backwards:6.0f} backwards {seconds:7.2f} s")
        if given.record:
            with given.record.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
