"""What the default suite costs on CrossMax, next to `rapid` on the mean of the same members.

    python scripts/benchmarks/bench_ensembles.py --models DIR --data FILE.npz --limit N [--before TREE]

Evaluates CrossMax over the four shared ResNets in DIR by `auto`, and the mean of their logits by `rapid`, on the
same images, each as a command of its own; prints processor seconds, passes and robust images. With --before the
same is run by another checkout. Needs 2 to 10 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MEMBERS = ";".join(f"robustkit:cifar-resnet{depth}@resnet{depth}.safetensors" for depth in (20, 32, 44, 56))
RUNS = {"auto on CrossMax": ("crossmax", "auto"), "rapid on the mean": ("logits", "rapid")}


def run(tree: Path, models: Path, combine: str, arguments: list[str]) -> tuple[float, dict[str, Any]]:
    """Return the processor seconds of one evaluation by a checkout, and its report."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        words = [sys.executable, "-m", "robustkit", "evaluate", f"ensemble:[{MEMBERS}]?combine={combine}"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        subprocess.run(
            [*words, *arguments, "--out", str(out)], cwd=models, env=environment, check=True, capture_output=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        report = json.loads((out / "report.json").read_text())
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, report


def main() -> None:
    """Run the evaluations and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=int, required=True)
    parser.add_argument("--threat", default="linf:8/255")
    parser.add_argument("--before", type=Path)
    arguments = parser.parse_args()
    common = ["--data", arguments.data, "--limit", str(arguments.limit), "--threat", arguments.threat]
    trees = {"now": ROOT} | ({"before": arguments.before} if arguments.before else {})
    for name, tree in trees.items():
        seconds = list[float]()
        for title, (combine, suite) in RUNS.items():
            cpu, report = run(tree, arguments.models, combine, [*common, "--suite", suite])
            cost, checks = report["cost"], report["checks"]
            passes, checking = (part["forwards"] + part["backwards"] for part in (cost, checks))
            robust = {verdict["index"] for verdict in report["verdicts"] if verdict["robust"]}
            print(
                f"{name}: {title}: {cpu:.1f} s, {passes} passes, {checking} in the checks, robust {sorted(robust)}"
            )
            seconds.append(cpu)
        print(f"{name}: ratio {seconds[0] / seconds[1]:.1f}", flush=True)


if __name__ == "__main__":
    main()
