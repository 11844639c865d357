"""What robustkit adds to AutoAttack: both on the same images in one process, verdicts and seconds compared.

    python scripts/benchmarks/bench_overhead.py --model MODEL --data FILE.npz --limit N [--threat linf:8/255] \
        [--rounds 1]

Runs pyautoattack's `standard` suite as its authors call it, then `robustkit evaluate --suite autoattack`, with
the same seed, batch and threads, and prints both robust accuracies, the samples that only one of them broke,
counted propagations, seconds and their ratio. With --rounds above 1 the order alternates and the ratio is that
of the sums. Expected: the same verdicts, and less than 5 % more time. Needs 1 to 15 minutes on 2 cores,
depending on the net; see scripts/results/.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from pyautoattack import AutoAttack

from robustkit.core.threat import ThreatModel
from robustkit.data import load_data
from robustkit.data.samples import Samples
from robustkit.engine.evaluation.run import Evaluation
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.models import load_model
from robustkit.models.classifier import Classifier
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


def main() -> None:
    """Run both and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=int, required=True)
    parser.add_argument("--threat", default="linf:8/255")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    # Both sides get the same net: no parameter gradients, so that FAB does not compute them on one side only.
    model = load_model(arguments.model).requires_grad_(False)
    samples = load_data(arguments.data).head(arguments.limit)
    threat = ThreatModel.parse(arguments.threat)
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
