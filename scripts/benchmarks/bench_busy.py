"""Processor time of commands with two threads beside busy processes: threads that spin against threads that sleep.

    python scripts/benchmarks/bench_busy.py [--busy 2] [--rounds 2] [steps doctor "evaluate --limit 50"]

Runs each command of robustkit in turn with libgomp's default (threads that wait spin) and with what the command
line sets (they sleep), beside so many processes that do nothing but compute, and prints the seconds. Expected:
fewer where threads sleep, by far where the net is large enough for two threads. Takes minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import os
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping

# How often a thread looks by default before it sleeps (libgomp's manual, GOMP_SPINCOUNT).
WAYS = {"spin": {"GOMP_SPINCOUNT": "300000"}, "sleep": {"OMP_WAIT_POLICY": "passive"}}
# What the command "steps" is: forward and backward passes of 8 images through 12 convolutions.
STEPS = """
import torch
from torch import nn
layers = [(nn.Conv2d(16 if i else 3, 16, 3, padding=1), nn.ReLU()) for i in range(12)]
net = nn.Sequential(*[part for pair in layers for part in pair])
x = torch.rand(8, 3, 32, 32, requires_grad=True)
for _ in range(60):
    torch.autograd.grad(net(x).sum(), x)
"""


def seconds(command: str, environment: Mapping[str, str]) -> tuple[float, float]:
    """Return the processor seconds and the wall seconds of one command."""
    words = ["-c", STEPS] if command == "steps" else ["-m", "robustkit", *shlex.split(command)]
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [sys.executable, *words],
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, time.perf_counter() - begun


def main() -> None:
    """Run the commands by turns and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commands", nargs="*", default=["steps", "doctor", "evaluate --limit 50"])
    parser.add_argument("--busy", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(arguments.busy)]
    try:
        print(f"{os.cpu_count()} cores, {arguments.busy} busy processes, load average {os.getloadavg()[0]:.1f}")
        for command in arguments.commands:
            for _ in range(arguments.rounds):
                for way, variables in WAYS.items():
                    cpu, wall = seconds(command, {"OMP_NUM_THREADS": "2", **variables})
                    print(f"{command}: threads {way}: {cpu:.1f} s of processor time, {wall:.1f} s", flush=True)
    finally:
        for process in busy:
            process.kill()


if __name__ == "__main__":
    main()
