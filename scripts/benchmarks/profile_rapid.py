"""How much of `rapid`'s time is the model's, and how much is spent around it: scheduling, steps, judging, ledger.

    python scripts/benchmarks/profile_rapid.py --model MODEL --data FILE.npz --limit N [--threat T]

Runs `robustkit evaluate --suite rapid` in float32 with a run folder, and a clock around every forward and backward
pass, those that choose how to run the model included. Needs a minute for 256 images of an adversarially trained
ResNet-20 on one core; see scripts/results/. Expected: less than 10 % around the model.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from robustkit.core.threat import ThreatModel
from robustkit.data import load_data
from robustkit.engine.evaluation.run import Evaluation
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.models import load_model


def main() -> None:
    """Run it and print where the time went."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=int, required=True)
    parser.add_argument("--threat", default="linf:8/255")
    arguments = parser.parse_args()
    model = load_model(arguments.model).requires_grad_(False)
    samples = load_data(arguments.data).head(arguments.limit)
    seconds = {"forward": 0.0, "backward": 0.0}

    def clocked(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **more: Any) -> Any:
            begun = time.perf_counter()
            try:
                return work(*given, **more)
            finally:
                seconds[name] += time.perf_counter() - begun

        return run

    InstrumentedModel.uncounted = clocked("forward", InstrumentedModel.uncounted)  # type: ignore[method-assign]
    torch.autograd.grad = clocked("backward", torch.autograd.grad)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        plan = Evaluation(model, samples, ThreatModel.parse(arguments.threat), "rapid", precision="fp32")
        report = plan.run(Path(folder) / "run")
    whole = time.perf_counter() - begun
    name, around = arguments.model.rpartition("/")[2], whole - sum(seconds.values())
    print(f"{name}  {arguments.threat}  {report.n} images", end="  ")
    print(f"torch {torch.__version__}  {torch.get_num_threads()} threads")
    for part, spent in {**seconds, "around": around}.items():
        print(f"  {part:<9}{spent:>7.1f} s  {spent / whole:>6.1%}")
    print(f"  whole    {whole:>7.1f} s; slots full while images waited: {report.environment['occupancy']:.1%}")


if __name__ == "__main__":
    main()
