"""Two workers of one thread against one of one thread, on a real net; start-up measured separately.

    python scripts/benchmarks/bench_workers.py --model robustkit:cifar-resnet20@resnet20-at.safetensors --data \
        test.npz

Both runs are of the same 512 images and the same suite in float32; the verdicts have to be equal. Of each it
prints the seconds from the first sample handed out to the last verdict, which is what scales, and those before it:
the model loaded by driver and workers, clean pass and checks. About 10 minutes on 2 idle cores; with anything else
on them the numbers mean nothing.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import torch

from robustkit import evaluate, load_data, load_model
from robustkit.engine.progress import Progress
from robustkit.runs.evaluation_record import Report


class Clock(Progress):
    """Notes when the attacks begin and when the last of them ends."""

    def __init__(self) -> None:
        """Begin now."""
        self.begun = self.attacks = self.last = time.perf_counter()
        self.stages = 0

    def stage(self, name: str, images: int, robust: int, n: int) -> None:
        """Note the first after the clean pass."""
        self.stages += 1
        self.attacks = self.last = time.perf_counter() if self.stages <= 2 else self.attacks

    def say(self, text: str) -> None:
        """Start the timer again when all workers have started."""
        print(f"  {text}")
        if "at work" in text and self.stages >= 2:
            self.attacks = time.perf_counter()

    def advance(self, done: float, robust: int) -> None:
        """Note that the attacks go on."""
        self.last = time.perf_counter()


def timed(
    model: str, data: str, limit: int, threat: str, suite: str, workers: int, ray: str | None = None
) -> tuple[Report, float]:
    """Return a run's report and the seconds that its attacks took."""
    net, samples = load_model(model), load_data(data).head(limit)
    clock = Clock()
    words: dict[str, Any] = {
        "suite": suite,
        "precision": "fp32",
        "workers": workers,
        "ray": ray,
        "progress": clock,
    }
    report = evaluate(net, samples, None, threat, **words)
    attacks = clock.last - clock.attacks
    where = " on Ray" if ray else ""
    print(f"{workers} workers{where}: attacks {attacks:.1f} s, before them {clock.attacks - clock.begun:.1f} s")
    return report, attacks


def main() -> None:
    """Print seconds and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=int, default=512)
    parser.add_argument("--threat", default="linf:8/255")
    parser.add_argument("--suite", default="rapid")
    parser.add_argument("--ray", help="run two workers at this address of a Ray cluster as well, e.g. local")
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before")
    found = []
    for workers in (1, 2):
        torch.set_num_threads(workers)  # which the workers share
        found.append(
            timed(arguments.model, arguments.data, arguments.limit, arguments.threat, arguments.suite, workers)
        )
    (one, alone), (two, shared) = found
    equal = [v.robust for v in one.verdicts] == [v.robust for v in two.verdicts] and one.run_id == two.run_id
    if arguments.ray:
        _, there = timed(
            arguments.model, arguments.data, arguments.limit, arguments.threat, arguments.suite, 2, arguments.ray
        )
        print(f"{there / shared:.2f} of the time of two processes is what two workers on Ray take")
    print(f"{alone / shared:.2f} times as fast; verdicts and run_id {'equal' if equal else 'DIFFER'}")


if __name__ == "__main__":
    main()
