"""Does a sample's verdict depend on who else is evaluated? Other slots, and two halves apart, against one run.

    python scripts/same_verdicts.py --model MODEL --data FILE.npz --limit N [--threat T] [--slots 7 64 256]

Runs `rapid` once for each number of slots in float32, then on the first half alone, and lists every image whose
verdict is not the same everywhere, with its margins. Rounding in the model's kernels depends on the batch: images
right at the boundary may differ; others must not. Needs about 1 minute for 64 images of a ResNet-20 on 2 cores and
slots of 64, and longer for fewer; see scripts/results/.
"""

from __future__ import annotations

import argparse
import time

import torch

from robustkit.data import load_data
from robustkit.engine.evaluate import Evaluation
from robustkit.models import load_model
from robustkit.record import Outcome
from robustkit.threat import ThreatModel


def main() -> None:
    """Run all and print what differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=int, required=True)
    parser.add_argument("--threat", default="linf:8/255")
    parser.add_argument("--slots", type=int, nargs="+", default=[64, 7, 256])
    arguments = parser.parse_args()
    model, threat = load_model(arguments.model), ThreatModel.parse(arguments.threat)
    samples = load_data(arguments.data).head(arguments.limit)
    half = len(samples) // 2
    runs: dict[str, list[Outcome]] = {}
    plans = [(f"{slots} slots", len(samples), slots) for slots in arguments.slots]
    for name, limit, slots in [*plans, ("first half alone", half, arguments.slots[0])]:
        begun = time.perf_counter()
        plan = Evaluation(model, samples.head(limit), threat, "rapid", precision="fp32", batch_size=slots)
        report = plan.run()
        runs[name] = list(report.verdicts)
        robust = sum(verdict.robust for verdict in report.verdicts)
        print(f"{name}: {robust} of {limit} robust, {time.perf_counter() - begun:.0f} s", flush=True)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {threat}")
    for index in range(len(samples)):
        seen = {name: verdicts[index] for name, verdicts in runs.items() if index < len(verdicts)}
        if len({verdict.robust for verdict in seen.values()}) > 1:
            margins = ", ".join(f"{name} {verdict.margin:+.5f}" for name, verdict in seen.items())
            print(f"  image {index}: {margins}")
    print("other images: the same verdict in every run")


if __name__ == "__main__":
    main()
