"""Seconds of a pass by precision, memory layout and converted weights, and the rounding of a search in bf16.

    python scripts/benchmarks/bench_precision.py DATA.npz MODEL[=ROWS] ...

A model is a usage string, `mlp` (two hidden layers of 512) or a timm name after `timm-32:`, built for 32 x 32
images with random weights. Each config is timed in turn on ROWS images (64), the size of a step, forward and
backward, by the process's CPU seconds; the least of three turns counts. `rounding` is the largest error of a
difference of two logits over 128 images, clean, random and after 1 to 5 steps of a search in bf16, as a share of
the largest logit.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import robustkit
from robustkit.core import criteria
from robustkit.core.isolation import evaluation_mode, threads
from robustkit.core.threat import ThreatModel
from robustkit.engine.model.instrumented_model import ROUNDING, ExecutionConfig, InstrumentedModel
from robustkit.engine.model.profiling import measure, timed_pass
from robustkit.engine.model.rounding import measured_rounding
from robustkit.engine.model.tuning import ConfigBuilder, tune
from robustkit.models import as_classifier
from robustkit.models.classifier import Classifier

THREAT = ThreatModel.parse("linf:8/255")
CONFIGS = {
    "float32": ("fp32", "contiguous", False),
    "float32, channels_last": ("fp32", "channels_last", False),
    "float32, channels_last weights kept": ("fp32", "channels_last", True),
    "bf16 by autocast": ("bf16", "contiguous", False),
    "bf16 by autocast, channels_last": ("bf16", "channels_last", False),
    "bf16, weights kept": ("bf16", "contiguous", True),
    "bf16, channels_last, weights kept": ("bf16", "channels_last", True),
}
TURNS, STEPS = 3, 5


class Operations(TorchDispatchMode):
    """Counts the operations that torch dispatches."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += 1
        return operation(*args, **(kwargs or {}))


def loaded(text: str) -> Classifier:
    """Return a model of the command line."""
    torch.manual_seed(0)
    if text == "mlp":
        widths = (3 * 32 * 32, 512, 512)
        layers = [part for pair in itertools.pairwise(widths) for part in (nn.Linear(*pair), nn.ReLU())]
        return as_classifier(nn.Sequential(nn.Flatten(), *layers, nn.Linear(512, 10)))
    if text.startswith("timm-32:"):
        import timm

        return as_classifier(timm.create_model(text[8:], img_size=32, patch_size=4, num_classes=10))
    return robustkit.load_model(text)


def main() -> None:
    """Print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("models", nargs="+")
    options = parser.parse_args()
    images = robustkit.load_data(options.data).images(range(128))
    for text in options.models:
        name, equals, number = text.rpartition("=")
        string, rows = (name, int(number)) if equals and number.isdigit() else (text, 64)
        classifier = loaded(string)
        model = InstrumentedModel(classifier, torch.device("cpu"))
        with evaluation_mode(classifier), threads(1):
            measure(model, images[:1], 256)
            print(f"\n{Path(string).name}, {rows} images in a step", flush=True)
            print_times(model, images, rows)
            print_choice(model, images, rows)


def print_times(model: InstrumentedModel, images: Tensor, rows: int) -> None:
    """Print operations of a pass, and CPU milliseconds of an image, of each config."""
    builder = ConfigBuilder(model, images[:2])
    configs = {
        name: builder.config(fold=True, precision=precision, layout=layout, converted=converted)
        for name, (precision, layout, converted) in CONFIGS.items()
    }
    taken: dict[str, list[float]] = {name: [] for name in configs}
    counts = {}
    for name, config in configs.items():
        with model.using(config):
            timed_pass(model, images[:2])
            with Operations() as operations:
                timed_pass(model, images[:2])
        counts[name] = operations.count
    for _ in range(TURNS):
        for name, config in configs.items():
            begun = time.process_time()
            with model.using(config):
                timed_pass(model, images[:rows])
            taken[name].append(time.process_time() - begun)
    for name, seconds in taken.items():
        print(f"  {name:<36}{counts[name]:>6} operations {1000 * min(seconds) / rows:>9.3f} ms an image")


def print_choice(model: InstrumentedModel, images: Tensor, rows: int) -> None:
    """Print what a search chooses, what the choice costs, and bounds on rounding beside the rounding itself."""
    builder = ConfigBuilder(model, images[:2])
    config = builder.config(fold=True, precision="bf16", layout="channels_last", converted=True)
    few = images[: min(16, rows)]
    begun = time.process_time()
    count = tune(model, few, precision=True, rows=rows, threat=THREAT)
    seconds = time.process_time() - begun
    bound = max(ROUNDING["bf16"], measured_rounding(model, config, few, THREAT)[0])
    points = images[: max(rows, 16)] if model.slow_batch else images
    print(f"  chosen: {model.precision}, {model.layout}; {count} images and {seconds:.2f} s for the choice")
    print(f"  rounding of bf16 {rounding_of(model, config, points):.4f}, bound {bound:.4f}, formula {2**-6:.4f}")


def rounding_of(model: InstrumentedModel, config: ExecutionConfig, x: Tensor) -> float:
    """Return the largest rounding of margins on clean images, random points, and those of a search."""
    points = x + float(THREAT.eps) * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).sign()
    found, largest = THREAT.project(points, x), 0.0
    labels = model.uncounted(x).detach().argmax(1)
    for step in range(STEPS + 2):
        point = x if step == 0 else found
        with model.using(config):
            images = point.detach().requires_grad_()
            logits = model.uncounted(images)
            (gradient,) = torch.autograd.grad(criteria.ce(logits, labels).sum(), images)
        with torch.no_grad(), model.using(ExecutionConfig(model.model)):
            expected = model.uncounted(point)
        error = logits.detach() - expected
        largest = max(largest, float(((error.amax(1) - error.amin(1)) / expected.abs().amax(1)).max()))
        if step:
            found = THREAT.project(found + float(THREAT.eps) / 4 * THREAT.ascent(gradient), x)
    return largest


if __name__ == "__main__":
    main()
