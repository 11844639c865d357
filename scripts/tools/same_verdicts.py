"""Does a sample's verdict depend on who else is evaluated, in what order, or on a crash?

    python scripts/tools/same_verdicts.py --model MODEL --data FILE.npz --limit N [--threat T] [--slots 64 1 7 256]

Runs `rapid` in float32 once for each number of slots, on the images in another order, on two halves apart, and
interrupted at random moments until it is done; then lists every image whose verdict is not the same everywhere,
with its margins. Rounding in the model's kernels depends on the batch: images right at the boundary may differ,
others must not. Needs about 5 minutes for 64 images of a ResNet-20 on one core; see scripts/results/.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from robustkit.core.threat import ThreatModel
from robustkit.data import load_data
from robustkit.engine.evaluation import block_runner
from robustkit.engine.evaluation.run import Evaluation
from robustkit.engine.progress import Progress
from robustkit.models import load_model
from robustkit.runs.evaluation_record import Report

Seen = dict[int, tuple[bool, float]]


class Interrupted(Progress):
    """Interrupts a run after a random time."""

    def __init__(self, seconds: float) -> None:
        self.end = time.perf_counter() + seconds

    def advance(self, done: float, robust: int) -> None:
        """Interrupt if it is time."""
        if time.perf_counter() > self.end:
            raise KeyboardInterrupt


def interrupted(plan: Evaluation, most: float) -> Report:
    """Return the report of a run that was stopped again and again after at most so many seconds."""
    draw, stops = random.Random(0), 0
    block_runner.BlockRunner.write_every = 0.5
    with tempfile.TemporaryDirectory() as folder:
        while True:
            try:
                report = plan.run(Path(folder) / "run", Interrupted(most * draw.random()) if stops < 10 else None)
                print(f"  {stops} interruptions", flush=True)
                return report
            except KeyboardInterrupt:
                stops += 1


def seen(report: Report, index: np.ndarray) -> Seen:
    """Return verdict and margin of each image by its position in the whole."""
    return {int(index[v.index]): (v.robust, v.margin) for v in report.verdicts}


def main() -> None:
    """Run all and print what differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=int, required=True)
    parser.add_argument("--threat", default="linf:8/255")
    parser.add_argument("--slots", type=int, nargs="+", default=[64, 1, 7, 256])
    arguments = parser.parse_args()
    model, threat = load_model(arguments.model), ThreatModel.parse(arguments.threat)
    samples = load_data(arguments.data).head(arguments.limit)
    every, order = np.arange(len(samples)), np.random.default_rng(0).permutation(len(samples))
    plan = Evaluation(model, samples, threat, "rapid", precision="fp32", batch_size=arguments.slots[0])

    def part(index: np.ndarray) -> Seen:
        return seen(replace(plan, samples=samples.pick(index)).run(), index)

    half, first = len(samples) // 2, f"{arguments.slots[0]} slots"
    ways: dict[str, Callable[[], Seen]] = {
        f"{slots} slots": partial(lambda slots: seen(replace(plan, batch_size=slots).run(), every), slots)
        for slots in arguments.slots
    }
    ways["another order"] = lambda: part(order)
    ways["two halves"] = lambda: part(order[:half]) | part(order[half:])
    ways["interrupted"] = lambda: seen(interrupted(plan, seconds[first]), every)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {threat}, {len(samples)} images")
    runs, seconds = dict[str, Seen](), dict[str, float]()
    for name, way in ways.items():
        begun = time.perf_counter()
        runs[name] = way()
        seconds[name] = time.perf_counter() - begun
        robust = sum(is_robust for is_robust, _ in runs[name].values())
        print(f"{name}: {robust} robust, {seconds[name]:.0f} s", flush=True)
    differ = [image for image in every.tolist() if len({verdicts[image][0] for verdicts in runs.values()}) > 1]
    for image in differ:
        print(
            f"  image {image}: "
            + ", ".join(f"{name} {verdicts[image][1]:+.5f}" for name, verdicts in runs.items())
        )
    same = [image for image in every.tolist() if image not in differ]
    shift = max(abs(verdicts[image][1] - runs[first][image][1]) for verdicts in runs.values() for image in same)
    print(f"{len(differ)} images differ; the largest difference of a margin among the others is {shift:.2g}")


if __name__ == "__main__":
    main()
