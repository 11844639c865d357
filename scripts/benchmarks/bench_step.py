"""CPU seconds of searches on small nets, for this checkout and another one, in turn; their verdicts must be equal.

    python scripts/benchmarks/bench_step.py --before CHECKOUT [--repeats 3] [--only WORD]

Each run is a process of its own with one thread. The time is the processor's (user and system) inside the
continuous batch, the net's passes included: the fixed checks and the start are not in it. Other programs on the
machine change it little; the smallest of the repeats is printed. All fields of the verdicts and the passes of each
stage are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DIGITS = ("robustkit:digits-cnn", "digits:test", "linf:0.15")
# The attacks of `rapid` that every image goes through.
RAPID = (
    "pgd(steps=1,step_size=1,loss=margin,random_start=false),"
    "pgd(steps=5,step_size=0.5,loss=margin,random_start=false),race,apgd(loss=ce,steps=30)"
)
CASES = {
    "square": ("square(queries=2000)", *DIGITS, 64),
    "race": ("race", *DIGITS, 64),
    "apgd": ("apgd(steps=100,restarts=3)", *DIGITS, 64),
    "rapid without Square": (RAPID, *DIGITS, 128),
}
RUN = """
import json, sys, time, torch, robustkit
from robustkit.engine.batching.continuous_batch import ContinuousBatch

torch.set_num_threads(1)
spent, run = [0.0], ContinuousBatch.run


def timed(batch):
    steps = run(batch)
    while True:
        begun = time.process_time()
        try:
            finished = next(steps)
        except StopIteration:
            return
        finally:
            spent[0] += time.process_time() - begun
        yield finished


ContinuousBatch.run = timed
suite, model, data, threat, limit = json.loads(sys.argv[1])
model, data = robustkit.load_model(model), robustkit.load_data(data).head(limit)
robustkit.evaluate(model, data.head(4), threat=threat, suite="pgd(steps=2)", precision="fp32")
spent[0] = 0.0
report = robustkit.evaluate(model, data, threat=threat, suite=suite, precision="fp32")
stages = [[stage.attack, stage.forwards, stage.backwards] for stage in report.stages[1:]]
print(json.dumps([spent[0], [repr(verdict) for verdict in report.verdicts], stages]))
"""


def measured(checkout: Path, case: tuple[object, ...]) -> tuple[float, object, list[list[object]]]:
    """Return CPU seconds, verdicts, and passes of the stages of one run by the code of a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, json.dumps(case)]
    out = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True, check=True).stdout
    seconds, verdicts, stages = json.loads(out.splitlines()[-1])
    return seconds, verdicts, stages


def main() -> None:
    """Print a row for each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    print("python", *sys.argv)
    print(f"{'case':24}{'before':>9}{'now':>9}{'ratio':>8}  verdicts, passes")
    for name, case in CASES.items():
        if arguments.only not in name:
            continue
        runs: dict[Path, list[tuple[float, object, list[list[object]]]]] = {arguments.before: [], ROOT: []}
        for _ in range(arguments.repeats):
            for checkout, found in runs.items():
                found.append(measured(checkout, case))
        before, now = (min(run[0] for run in found) for found in runs.values())
        same = [len({json.dumps(run[part]) for found in runs.values() for run in found}) == 1 for part in (1, 2)]
        words = ", ".join("the same" if equal else "DIFFERENT" for equal in same)
        print(f"{name:24}{before:8.2f}s{now:8.2f}s{before / now:8.2f}  {words}", flush=True)


if __name__ == "__main__":
    main()
