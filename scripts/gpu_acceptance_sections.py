"""The sections of scripts/gpu_acceptance.py: each yields rows of figures."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from gpu_acceptance_setup import QUICK, Row, Setup
from step_costs import ATTACKS, LONG, SHORT, run_batch
from torch import Tensor

from robustkit import craft, evaluate, load_data, load_model, train
from robustkit.core.float32 import float32_operations
from robustkit.core.threat import ThreatModel
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.engine.model.profiling import measure
from robustkit.models.classifier import Classifier
from robustkit.runs.evaluation_record import Report

ROOT = Path(__file__).parents[1]
TRAIN_BATCH = 128


def gpu_tests(setup: Setup) -> Iterator[Row]:
    """Run the tests marked gpu."""
    words = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    yield {"exit code": done.returncode, "result": lines[-1] if lines else done.stderr[-500:]}
    if done.returncode:
        raise RuntimeError("\n".join(lines[-40:]))


def _robust(report: Report) -> set[int]:
    return {verdict.index for verdict in report.verdicts if verdict.robust}


def _against_autoattack(
    setup: Setup, name: str, model: Classifier, x: Tensor, y: Tensor, runs: Sequence[tuple[str, str]]
) -> Iterator[Row]:
    """Run pyautoattack in float32 as its authors call it, and suites in a precision, on the same images."""
    from pyautoattack import AutoAttack

    threat = ThreatModel.parse(setup.sizes.threat)
    there, labels = x.to(setup.device), y.to(setup.device)
    setup.pass_seconds(model, x)  # what a device does at its first passes is in no run's time

    def by_authors() -> Tensor:
        official = AutoAttack(
            model, norm="Linf", eps=float(threat.eps), seed=0, version="standard", device=setup.device
        )
        if setup.sizes is QUICK:
            official.attacks_to_run, official.square.n_queries = ["square"], 3
        adversarial: Tensor = official.run_standard_evaluation(there, labels, batch_size=len(x))[0]
        return adversarial

    with float32_operations("ieee"):
        adversarial, theirs = setup.timed(by_authors)
        with torch.no_grad():
            robust = set((model(adversarial).argmax(1) == labels).nonzero()[:, 0].tolist())
    common: Row = {"net": name, "images": len(x)}
    yield common | {"run": "pyautoattack", "robust": len(robust), "seconds": theirs}
    for suite, precision in runs:
        options: Row = {"suite": suite, "precision": precision, "device": str(setup.device)}
        report, ours = setup.timed(partial(evaluate, model, x, y, threat, **options))
        around = report.environment
        yield common | {
            "run": f"{suite} {precision}",
            "robust": len(_robust(report)),
            "fooled by AutoAttack only": len(_robust(report) - robust),
            "fooled by robustkit only": len(robust - _robust(report)),
            "seconds": ours,
            "times as fast": theirs / ours,
            "passes per image": (report.cost.forwards + report.cost.backwards) / len(x),
            "slots": around.get("slots"),
            "images at once": around.get("images_at_once"),
            "search": f"{around.get('precision')} {around.get('layout', '')}".strip(),
        }


def autoattack_wide(setup: Setup) -> Iterator[Row]:
    """Compare on shapes of WRN-28-10; the labels are the predictions of the random net."""
    model, x = setup.wide(), setup.images(setup.sizes.wide_images)
    with torch.no_grad():
        y = model(x.to(setup.device)).argmax(1).cpu()
    runs = [(setup.sizes.rapid, "auto"), (setup.sizes.rapid, "fp32"), (setup.sizes.autoattack, "fp32")]
    yield from _against_autoattack(setup, "wrn-{}-{}".format(*setup.sizes.wide), model, x, y, runs)


def autoattack_nets(setup: Setup) -> Iterator[Row]:
    """Compare `rapid` on trained nets, in order of their names until the time is over."""
    if not setup.nets or setup.data is None:
        yield {"net": "none: give --models FOLDER and --data FILE.npz"}
        return
    samples = load_data(setup.data).head(setup.sizes.net_images)
    x, y = samples.images(range(len(samples))), torch.from_numpy(samples.labels)
    for name, string in setup.nets.items():
        runs = [(setup.sizes.rapid, "auto"), (setup.sizes.rapid, "fp32")]
        yield from _against_autoattack(setup, name, load_model(string).to(setup.device), x, y, runs)


def verdicts(setup: Setup) -> Iterator[Row]:
    """Compare the verdicts of the GPU and of the CPU in float32."""
    samples = load_data("digits:test").head(setup.sizes.verdict_images)
    for suite in setup.sizes.verdict_suites:
        options: Row = {"threat": setup.sizes.verdict_threat, "suite": suite, "precision": "fp32"}
        model = load_model("robustkit:digits-cnn")
        reports = [
            evaluate(model, samples, device=str(device), **options)
            for device in (setup.device, torch.device("cpu"))
        ]
        gpu, cpu = (report.verdicts for report in reports)
        pairs = list(zip(gpu, cpu, strict=True))
        margins = [abs(a.margin - b.margin) for a, b in pairs if a.margin is not None and b.margin is not None]
        yield {
            "suite": suite,
            "images": len(samples),
            "other verdict": sum(a.robust != b.robust for a, b in pairs),
            "other attack": sum(a.attack != b.attack for a, b in pairs),
            "largest difference of margins": max(margins, default=None),
        }


@contextmanager
def counted_syncs() -> Iterator[Counter[str]]:
    """Count, by line, the synchronisations that torch warns of inside."""
    counts = Counter[str]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield counts
        finally:
            torch.cuda.set_sync_debug_mode("default")
            for warning in caught:
                if "synchronizing" in str(warning.message):
                    counts[f"{Path(warning.filename).name}:{warning.lineno}"] += 1


def syncs(setup: Setup) -> Iterator[Row]:
    """Count the synchronisations of a step that torch warns of; docs/speed.md has those of the simulated GPU."""
    for attack in setup.sizes.step_attacks:
        counts, steps = list[Counter[str]](), list[int]()
        for number in (SHORT, LONG):
            with counted_syncs() as found:
                steps.append(run_batch(ATTACKS[attack], number))
            counts.append(found)
        more, taken = counts[1] - counts[0], steps[1] - steps[0]
        most = ", ".join(f"{line} {number / taken:.2f}" for line, number in more.most_common(4))
        yield {"attack": attack, "syncs per step": more.total() / taken, "lines": most}


def memory(setup: Setup) -> Iterator[Row]:
    """Compare the most memory that a forward and backward pass takes with what `measure` forecasts."""
    nets = {"wrn-{}-{}".format(*setup.sizes.wide): setup.wide()}
    nets[setup.sizes.arch] = load_model(setup.sizes.arch).to(setup.device)
    for name, model in nets.items():
        instrumented = InstrumentedModel(model, setup.device)
        measure(instrumented, setup.images(1).to(setup.device), 1 << 20)
        batch = min(setup.sizes.memory_batch, instrumented.micro_batch or 1)
        setup.synchronize()
        torch.cuda.reset_peak_memory_stats(setup.device)
        before = torch.cuda.memory_allocated(setup.device)
        setup.pass_seconds(model, setup.images(batch))
        peak = torch.cuda.max_memory_allocated(setup.device) - before
        yield {
            "net": name,
            "images": batch,
            "forecast MiB": batch * instrumented.saved_bytes / 2**20,
            "peak MiB": peak / 2**20,
            "peak / forecast": peak / (batch * instrumented.saved_bytes),
            "images that fit": instrumented.micro_batch,
        }


def craft_speed(setup: Setup) -> Iterator[Row]:
    """Compare the time of craft with that of its passes alone."""
    model = load_model(setup.sizes.arch).to(setup.device)
    x = setup.images(setup.sizes.craft_images)
    with torch.no_grad():
        y = model(x.to(setup.device)).argmax(1).cpu()
    forward, backward = setup.pass_seconds(model, x)
    for attack in ("mi-fgsm", "cwa"):
        call = f"{attack}(steps={setup.sizes.steps})"
        record = craft([model], x, y, setup.sizes.threat, attack=call, device=str(setup.device))
        bare = len(x) * (record.forwards_per_image * forward + record.gradients_per_image * backward)
        speed = len(x) / record.seconds
        yield {
            "attack": call,
            "images": len(x),
            "images/s": speed,
            "seconds": record.seconds,
            "bare passes": bare,
            "ratio": record.seconds / bare,
        }


def train_speed(setup: Setup) -> Iterator[Row]:
    """Compare the time of training with that of its passes alone."""
    x = setup.images(setup.sizes.train_images)
    y = torch.arange(len(x)) % 10
    net = load_model(setup.sizes.arch).to(setup.device).train()
    forward, backward = setup.pass_seconds(net, x[:TRAIN_BATCH], weights=True)
    for method in ("standard", "dverge"):
        with tempfile.TemporaryDirectory() as folder:
            record = train(
                method,
                x,
                y,
                arch=setup.sizes.arch,
                epochs=1,
                batch_size=min(TRAIN_BATCH, len(x)),
                out=Path(folder) / "run",
                device=str(setup.device),
                precision="fp32",
            )
        bare = record.cost["forwards"] * forward + record.cost["backwards"] * backward
        taken = record.cost["seconds"]
        row = {"images": len(x), "images/s": record.history[-1]["images_per_second"]}
        yield {"method": method} | row | {"seconds": taken, "bare passes": bare, "ratio": taken / bare}


# Each section with its seconds; together at most 480.
SECTIONS: dict[str, tuple[Callable[[Setup], Iterator[Row]], int]] = {
    "tests": (gpu_tests, 100),
    "autoattack-wide": (autoattack_wide, 100),
    "autoattack-nets": (autoattack_nets, 110),
    "verdicts": (verdicts, 35),
    "syncs": (syncs, 25),
    "memory": (memory, 20),
    "craft": (craft_speed, 30),
    "train": (train_speed, 50),
}
