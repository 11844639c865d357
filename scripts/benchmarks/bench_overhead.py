"""What robustkit adds to AutoAttack, or to a net's own passes: both on the same images in one process.

    python scripts/benchmarks/bench_overhead.py --model MODEL --data FILE.npz --limit N [--threat linf:8/255] \
        [--rounds 1]

Runs pyautoattack's `standard` suite as its authors call it, then `robustkit evaluate --suite autoattack`, with
the same seed, batch and threads, and prints both robust accuracies, the samples that only one of them broke,
counted propagations, seconds and their ratio. With --rounds above 1 the order alternates and the ratio is that
of the sums. Expected: the same verdicts, and less than 5 % more time. Needs 1 to 15 minutes on 2 cores,
depending on the net; see scripts/results/.

    python scripts/benchmarks/bench_overhead.py --suite rapid --model MODEL --data FILE.npz --limit N

Runs that suite of robustkit, then the same passes of the net alone (same sizes, precision and layout; a backward
pass after each forward pass that recorded a graph), and prints the processor seconds of both, and the rest as a
share.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from pyautoattack import AutoAttack
from torch import Tensor

from robustkit.core.threat import ThreatModel
from robustkit.data import load_data
from robustkit.data.samples import Samples
from robustkit.engine.evaluation.run import Evaluation
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.models import load_model
from robustkit.models.classifier import Classifier
from robustkit.models.prepared_net import PreparedNet
from robustkit.runs.evaluation_record import Report

NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}


def by_hand(
    model: Classifier, samples: Samples, threat: ThreatModel, seed: int
) -> tuple[set[int], float, InstrumentedModel]:
    """Return the robust positions, the seconds and the counts of pyautoattack called plainly."""
    x, y = samples.images(range(len(samples))), torch.from_numpy(samples.labels)
    instrumented = InstrumentedModel(model, torch.device("cpu"))
    begun = time.perf_counter()
    official = AutoAttack(
        instrumented, norm=NORMS[threat.norm], eps=float(threat.eps), seed=seed, version="standard"
    )
    x_adv, _ = official.run_standard_evaluation(x, y, batch_size=len(x))
    seconds = time.perf_counter() - begun
    with torch.no_grad():
        robust = model(x_adv).argmax(1) == y
    return set(robust.nonzero()[:, 0].tolist()), seconds, instrumented


def by_robustkit(
    model: Classifier, samples: Samples, threat: ThreatModel, seed: int
) -> tuple[set[int], float, Report]:
    """Return the robust positions, the seconds and the report of robustkit, run folder and all."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        plan = Evaluation(model, samples, threat, "autoattack", seed, batch_size=len(samples))
        report = plan.run(Path(folder) / "run")
    seconds = time.perf_counter() - begun
    return {verdict.index for verdict in report.verdicts if verdict.robust}, seconds, report


@dataclass(frozen=True)
class Pass:
    """One call of a net: how many images of what shape, whether with a graph, and how."""

    net: PreparedNet
    shape: torch.Size
    gradient: bool
    layout: torch.memory_format | None
    dtype: torch.dtype | None


def passes_of(work: Callable[[], object]) -> tuple[list[Pass], float]:
    """Return the passes of all nets during some work, and its processor seconds."""
    passes, forward = list[Pass](), PreparedNet.forward

    def logged(self: PreparedNet, images: Tensor, layout: torch.memory_format | None = None) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        gradient = torch.is_grad_enabled() and images.requires_grad
        passes.append(Pass(self, images.shape, gradient, layout, dtype))
        return forward(self, images, layout)

    begun = time.process_time()
    with patch.object(PreparedNet, "forward", logged):
        work()
    return passes, time.process_time() - begun


def replay(passes: Sequence[Pass]) -> float:
    """Return the processor seconds of these passes alone."""
    seconds = 0.0
    for one in passes:
        x = torch.rand(one.shape).requires_grad_(one.gradient)
        begun = time.process_time()
        with torch.set_grad_enabled(one.gradient):
            with torch.autocast("cpu", one.dtype, enabled=one.dtype is not None):
                logits = one.net(x, one.layout)
            if one.gradient:
                torch.autograd.grad(logits.sum(), x)
        seconds += time.process_time() - begun
    return seconds


def around(model: Classifier, samples: Samples, threat: ThreatModel, suite: str, seed: int) -> None:
    """Print the processor seconds of a suite, of its passes alone, and the rest as a share of these."""
    with tempfile.TemporaryDirectory() as folder:
        plan = Evaluation(model, samples, threat, suite, seed)
        passes, whole = passes_of(lambda: plan.run(Path(folder) / "run"))
    alone = replay(passes)
    images = sum(one.shape[0] * (1 + one.gradient) for one in passes)
    print(f"  {len(passes)} passes, {images} images forward and backward")
    print(f"  seconds: {whole:.1f} in all, {alone:.1f} in the net, the rest is {whole / alone - 1:.1%} of these")


def main() -> None:
    """Run both and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=int, required=True)
    parser.add_argument("--threat", default="linf:8/255")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--suite", default="autoattack")
    arguments = parser.parse_args()
    # Both sides get the same net: no parameter gradients, so that FAB does not compute them on one side only.
    model = load_model(arguments.model).requires_grad_(False)
    samples = load_data(arguments.data).head(arguments.limit)
    threat = ThreatModel.parse(arguments.threat)
    if arguments.suite != "autoattack":
        print(f"{arguments.model.rpartition('/')[2]}  {threat}  {len(samples)} images  {arguments.suite}")
        return around(model, samples, threat, arguments.suite, arguments.seed)
    seconds = {by_hand: 0.0, by_robustkit: 0.0}
    result: dict[object, tuple[set[int], float, Any]] = {}
    for number in range(arguments.rounds):
        for run in (by_hand, by_robustkit) if number % 2 == 0 else (by_robustkit, by_hand):
            result[run] = run(model, samples, threat, arguments.seed)
            seconds[run] += result[run][1]
    theirs, ours = result[by_hand][0], result[by_robustkit][0]
    instrumented, report = result[by_hand][2], result[by_robustkit][2]
    name = arguments.model.rpartition("/")[2]
    print(f"{name}  {threat}  {len(samples)} images  torch {torch.__version__}  {torch.get_num_threads()} threads")
    print(f"  robust: pyautoattack {len(theirs)}, robustkit {len(ours)}")
    print(f"  broken by pyautoattack alone {sorted(ours - theirs)}, by robustkit alone {sorted(theirs - ours)}")
    print(f"  propagations: pyautoattack {instrumented.forwards} + {instrumented.backwards}, ", end="")
    print(f"robustkit {report.cost.forwards} + {report.cost.backwards}")
    ratio = seconds[by_robustkit] / seconds[by_hand]
    print(
        f"  seconds: pyautoattack {seconds[by_hand]:.1f}, robustkit {seconds[by_robustkit]:.1f}, ratio {ratio:.3f}"
    )


if __name__ == "__main__":
    main()
