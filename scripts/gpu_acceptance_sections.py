"""The sections of scripts/gpu_acceptance.py: each yields rows of figures."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from robustkit import craft, evaluate, load_data, load_model, train
from robustkit.core.float32 import float32_operations
from robustkit.core.threat import ThreatModel
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.engine.model.profiling import measure
from robustkit.models import as_classifier
from robustkit.models.classifier import Classifier
from robustkit.models.zoo.wide_resnet import WideResNet
from robustkit.runs.evaluation_record import Report

ROOT = Path(__file__).parents[1]
Row = dict[str, Any]
T = TypeVar("T")
PASS_REPEATS = 3


@dataclass(frozen=True)
class Sizes:
    """How much a section computes."""

    wide: tuple[int, int]
    wide_images: int
    net_images: int
    verdict_images: int
    memory_batch: int
    craft_images: int
    train_images: int
    steps: int
    pixels: int
    eps: str
    arch: str
    autoattack: str
    rapid: str


FULL = Sizes(
    (28, 10), 32, 128, 64, 256, 512, 2048, 10, 32, "linf:8/255", "robustkit:cifar-resnet20", "autoattack", "rapid"
)
QUICK = Sizes(
    (10, 1),
    1,
    2,
    1,
    2,
    2,
    8,
    2,
    8,
    "linf:0.9",
    "robustkit:wrn-10-1",
    "autoattack:square(queries=3)",
    "race(steps=2)",
)


@dataclass(frozen=True)
class Setup:
    """What every section gets."""

    device: torch.device
    sizes: Sizes
    nets: dict[str, str]
    data: str | None

    def wide(self) -> Classifier:
        """Return a Wide ResNet with random weights, which shows what its shapes cost."""
        torch.manual_seed(0)
        depth, width = self.sizes.wide
        return as_classifier(WideResNet(depth=depth, width=width).eval()).to(self.device)

    def images(self, n: int) -> Tensor:
        """Return random images (n 3 H W) on the CPU."""
        return torch.rand(n, 3, self.sizes.pixels, self.sizes.pixels, generator=torch.Generator().manual_seed(1))

    def timed(self, work: Callable[[], T]) -> tuple[T, float]:
        """Return the result of work, and the seconds until the device has finished."""
        self.synchronize()
        begun = time.perf_counter()
        result = work()
        self.synchronize()
        return result, time.perf_counter() - begun

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def pass_seconds(self, model: Classifier, x: Tensor, *, weights: bool = False) -> tuple[float, float]:
        """Return the seconds of a forward and of a backward pass for one image, in float32 on a warm device.

        Args:
            model: on the device.
            x: images of one batch (B C H W).
            weights: whether the backward pass computes gradients of the weights as well.
        """
        x = x.to(self.device)
        wanted = [weight for weight in model.parameters() if weight.requires_grad] if weights else []

        def forward() -> tuple[Tensor, Tensor]:
            leaf = x.clone().requires_grad_()
            return model(leaf).sum(), leaf

        def both() -> None:
            loss, leaf = forward()
            torch.autograd.grad(loss, [leaf, *wanted], allow_unused=True)

        def repeat(work: Callable[[], object]) -> None:
            for _ in range(PASS_REPEATS):
                work()

        # Training leaves torch's own setting of TF32, everything else computes in full precision.
        with nullcontext() if weights else float32_operations("ieee"):
            both()
            _, first = self.timed(partial(repeat, forward))
            _, total = self.timed(partial(repeat, both))
        passes = PASS_REPEATS * len(x)
        return first / passes, max(total - first, 0.0) / passes


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


def _against_autoattack(setup: Setup, name: str, model: Classifier, x: Tensor, y: Tensor) -> Iterator[Row]:
    """Run pyautoattack as its authors call it, and both suites, on the same images."""
    from pyautoattack import AutoAttack

    threat = ThreatModel.parse(setup.sizes.eps)
    there, labels = x.to(setup.device), y.to(setup.device)
    setup.pass_seconds(model, x)

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
    rapid = setup.sizes.rapid
    runs = ((setup.sizes.autoattack, "fp32"), (rapid, "auto"), (rapid, "fp32"))
    for suite, precision in runs[1:2] if setup.sizes is QUICK else runs:
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
    yield from _against_autoattack(setup, "wrn-{}-{}".format(*setup.sizes.wide), model, x, y)


def autoattack_nets(setup: Setup) -> Iterator[Row]:
    """Compare on trained nets."""
    if not setup.nets or setup.data is None:
        yield {"net": "none: give --models FOLDER and --data FILE.npz"}
        return
    samples = load_data(setup.data).head(setup.sizes.net_images)
    x, y = samples.images(range(len(samples))), torch.from_numpy(samples.labels)
    for name, string in setup.nets.items():
        yield from _against_autoattack(setup, name, load_model(string).to(setup.device), x, y)


def verdicts(setup: Setup) -> Iterator[Row]:
    """Compare the verdicts of the GPU and of the CPU in float32."""
    samples = load_data("digits:test").head(setup.sizes.verdict_images)
    for suite in (setup.sizes.rapid,) if setup.sizes is QUICK else ("pgd(steps=10)", "rapid"):
        reports = [
            evaluate(
                load_model("robustkit:digits-cnn"),
                samples,
                threat=setup.sizes.eps if setup.sizes is QUICK else "linf:0.15",
                suite=suite,
                precision="fp32",
                device=str(device),
            )
            for device in (setup.device, "cpu")
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
    """Count the synchronisations of a step: the difference of two runs that have other numbers of steps."""
    samples = load_data("digits:test").head(setup.sizes.verdict_images)
    model = load_model("robustkit:digits-cnn").to(setup.device)
    short, long = setup.sizes.steps, 3 * setup.sizes.steps
    attacks = (("pgd", "steps"), ("race", "steps"), ("square", "queries"))
    for attack, field in attacks[:1] if setup.sizes is QUICK else attacks:
        counts = list[Counter[str]]()
        for steps in (short, long):
            with counted_syncs() as found:
                suite = f"{attack}({field}={steps})"
                # An eps at which hardly any image is fooled, so that every step takes place.
                evaluate(
                    model, samples, threat="linf:1e-4", suite=suite, precision="fp32", device=str(setup.device)
                )
            counts.append(found)
        more = counts[1] - counts[0]
        most = ", ".join(f"{line} {number / (long - short):.2f}" for line, number in more.most_common(4))
        yield {"attack": attack, "syncs per step": more.total() / (long - short), "lines": most}


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
        record = craft([model], x, y, setup.sizes.eps, attack=call, device=str(setup.device))
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
    forward, backward = setup.pass_seconds(load_model(setup.sizes.arch).to(setup.device), x[:128], weights=True)
    for method in ("standard", "dverge"):
        with tempfile.TemporaryDirectory() as folder:
            record = train(
                method,
                x,
                y,
                arch=setup.sizes.arch,
                epochs=1,
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
