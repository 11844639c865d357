"""Two workers of one thread against one, and against an earlier checkout, on a real net; start-up separately.

    python scripts/benchmarks/bench_workers.py --model robustkit:cifar-resnet20@resnet20-at.safetensors --data \
        test.npz --ray local --against /path/to/earlier/checkout

All runs are of the same 512 images and the same suite in float32, each in a process of its own; the verdicts have
to be equal. Of each it prints the seconds from the first sample of an attack to the last verdict, which is what
scales, and those before it: the model loaded by driver and workers, clean pass and checks. Paths have to be
absolute. About 2 minutes per run on 2 idle cores; with anything else on them the numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from robustkit import evaluate, load_data, load_model
from robustkit.engine.progress import Progress

HERE = Path(__file__).absolute().parents[2]


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
        """Count the attacks from when all workers have started, if that is after the first stage."""
        print(f"  {text}", file=sys.stderr)
        # The pool says "2 workers at work after 3.1 s".
        if "at work" in text and self.stages >= 2:
            self.attacks = time.perf_counter()

    def advance(self, done: float, robust: int) -> None:
        """Note that the attacks go on."""
        self.last = time.perf_counter()


def run_here(options: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds and verdicts of one run with the robustkit that is imported."""
    torch.set_num_threads(options.workers)  # which the workers share
    net, samples = load_model(options.model), load_data(options.data).head(options.limit)
    clock = Clock()
    settings: dict[str, Any] = {"suite": options.suite, "precision": "fp32", "progress": clock}
    settings |= {"workers": options.workers, "ray": options.ray}
    report = evaluate(net, samples, None, options.threat, **settings)
    return {
        "attacks": clock.last - clock.attacks,
        "before": clock.attacks - clock.begun,
        "run_id": report.run_id,
        "robust": [verdict.robust for verdict in report.verdicts],
    }


def run_in(checkout: Path, options: argparse.Namespace, workers: int, ray: str | None) -> dict[str, Any]:
    """Return the same of a new process that imports the robustkit of a checkout, and print the seconds."""
    command = [sys.executable, str(Path(__file__).absolute()), "--single", "--workers", str(workers)]
    for name in ("model", "data", "limit", "threat", "suite"):
        command += [f"--{name}", str(getattr(options, name))]
    command += ["--ray", ray] if ray else []
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    # Actors of Ray import from the folder of their driver first.
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment, text=True, cwd=checkout)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    where = f"{workers} workers{' on Ray' if ray else ''}{'' if checkout == HERE else ', earlier checkout'}"
    print(f"{where}: attacks {found['attacks']:.1f} s, before them {found['before']:.1f} s", flush=True)
    return found


def main() -> None:
    """Print seconds and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=int, default=512)
    parser.add_argument("--threat", default="linf:8/255")
    parser.add_argument("--suite", default="rapid")
    parser.add_argument("--ray", help="run two workers at this address of a Ray cluster as well, e.g. local")
    parser.add_argument("--against", type=Path, help="an earlier checkout, which runs two workers as well")
    parser.add_argument("--workers", type=int, default=2, help=argparse.SUPPRESS)
    parser.add_argument("--single", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.single:
        print(json.dumps(run_here(options)))
        return
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before")
    one = run_in(HERE, options, 1, None)
    runs = [one]
    for ray in [None, options.ray] if options.ray else [None]:
        earlier = run_in(options.against.absolute(), options, 2, ray) if options.against else None
        two = run_in(HERE, options, 2, ray)
        print(f"  {one['attacks'] / two['attacks']:.2f} times as fast as one worker")
        if earlier:
            print(f"  {earlier['attacks'] / two['attacks']:.3f} times as fast as the earlier checkout")
        runs += [two, earlier or two]
    equal = all((run["run_id"], run["robust"]) == (one["run_id"], one["robust"]) for run in runs)
    print(f"verdicts and run_id {'equal' if equal else 'DIFFER'}")


if __name__ == "__main__":
    main()
