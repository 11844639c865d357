"""What a defense is worth beside a plain net: clean and robust accuracy, and what an answer costs.

    python scripts/benchmarks/worth.py MODEL [MODEL ...] --data DATA --threat linf:8/255 --limit 64

Each model is evaluated by the default suite on the same images; name the plain net first, and a defense whose
draws can be fixed or whose members can be joined otherwise several times (`runs/m/`, `runs/m/?combine=logits`,
`runs/m/?noise=calm`). `direct` is robust accuracy after the suite's attacks on the model's own gradients alone,
which is all that most tables show of a defense. The cost is processor time of forward passes of one batch, by
turns, as a multiple of the first model's.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Sequence

import torch

from robustkit import evaluate, load_data, load_model
from robustkit.runs.report_parts import Rate

TURNS, BATCH = 9, 64


def seconds(models: Sequence[torch.nn.Module], x: torch.Tensor) -> list[float]:
    """Return the median processor seconds of a pass of each."""
    spent: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for _ in range(TURNS + 1):
            for model, times in zip(models, spent, strict=True):
                begun = time.process_time()
                model(x)
                times.append(time.process_time() - begun)
    return [statistics.median(times[1:]) for times in spent]


def text(rate: Rate) -> str:
    """Return a rate in percent, with its interval."""
    return f"{100 * rate.value:5.1f} ({100 * rate.low:.0f}-{100 * rate.high:.0f})"


def main() -> None:
    """Evaluate all, time them, print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--data", required=True)
    parser.add_argument("--threat", default="linf:8/255")
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--suite", default="auto")
    given = parser.parse_args()
    samples = load_data(given.data).head(given.limit)
    models = [load_model(string).eval() for string in given.models]
    x = samples.images(range(min(BATCH, len(samples))))
    costs = seconds(models, x)
    width = max(map(len, given.models))
    print(
        f"torch {torch.__version__}, {len(samples)} images of {given.data}, {given.threat}, suite {given.suite}\n"
    )
    print(f"{'model':{width}}{'clean':>17}{'direct':>17}{'robust':>17}{'cost':>7}  flags")
    for string, model, cost in zip(given.models, models, costs, strict=True):
        report = evaluate(model, samples, None, given.threat, suite=given.suite)
        own = list(itertools.takewhile(lambda stage: "@" not in stage.attack, report.stages))
        cells = [text(rate) for rate in (report.clean_accuracy, own[-1].robust_accuracy, report.robust_accuracy)]
        flags = ", ".join(sorted(flag.code for flag in report.flags))
        print(
            f"{string:{width}}{''.join(f'{cell:>17}' for cell in cells)}{cost / costs[0]:7.1f}  {flags}",
            flush=True,
        )


if __name__ == "__main__":
    main()
