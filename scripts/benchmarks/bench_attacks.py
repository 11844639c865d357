"""Own attacks against pyautoattack's, one by one, on the same images in one process.

    python scripts/benchmarks/bench_attacks.py --model MODEL --data FILE.npz --limit N [--threat linf:8/255] \
        [--attacks ...]

Each attack is run over all correctly classified images, with AutoAttack's standard settings; nothing is handed
from one to the next. Printed for each: images still robust (checked again by one forward, ball and box
included), seconds, forwards and backwards. Expected: own robust accuracy within the sampling noise or lower, in no
more time. Needs about an hour and a half for 256 images on resnet20 with 2 cores; see scripts/results/.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from robustkit.core.criteria import Goal
from robustkit.core.rng import RowRng
from robustkit.core.threat import ThreatModel
from robustkit.data import load_data
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.models import load_model
from robustkit.registry import make

ATTACKS = {
    "apgd": "autoattack:apgd-ce",
    "apgd-t": "autoattack:apgd-t",
    "fab-t": "autoattack:fab-t",
    "square": "autoattack:square",
}


def measure(name: str, model: Any, x: Tensor, goal: Goal, threat: ThreatModel, seed: int) -> dict[str, Any]:
    """Return what one attack leaves robust and what it costs."""
    attack: Callable[..., Tensor] = make(name)
    instrumented = InstrumentedModel(model, x.device)
    rng = RowRng(seed, name, torch.arange(len(x), device=x.device))
    torch.manual_seed(seed)
    begun = time.perf_counter()
    found = attack(instrumented, x.clone(), goal, threat, rng=rng)
    seconds = time.perf_counter() - begun
    with torch.no_grad():
        fooled = goal.reached(model(threat.project(found, x)))
    return {
        "fooled": fooled,
        "seconds": seconds,
        "forwards": instrumented.forwards,
        "backwards": instrumented.backwards,
    }


def main() -> None:
    """Run all pairs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=int, required=True)
    parser.add_argument("--threat", default="linf:8/255")
    parser.add_argument("--attacks", default=",".join(ATTACKS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    # Both sides get the same net: no parameter gradients, so that FAB does not compute them on one side only.
    model = load_model(arguments.model).requires_grad_(False).to(arguments.device)
    samples = load_data(arguments.data).head(arguments.limit)
    x = samples.images(range(len(samples))).to(arguments.device)
    y = torch.from_numpy(samples.labels).to(arguments.device)
    with torch.no_grad():
        right = model(x).argmax(1) == y
    x, goal, total = x[right], Goal(y[right]), len(x)
    threat = ThreatModel.parse(arguments.threat)
    name = arguments.model.rpartition("/")[2]
    print(f"{name}  {threat}  {len(x)} of {total} images correct  seed {arguments.seed}  ", end="")
    print(f"torch {torch.__version__}  {torch.get_num_threads()} threads  {arguments.device}")
    print(f"{'attack':<20}{'robust':>8}{'of all':>9}{'seconds':>10}{'forwards':>11}{'backwards':>11}")
    for own in arguments.attacks.split(","):
        pair = {side: measure(side, model, x, goal, threat, arguments.seed) for side in (own, ATTACKS[own])}
        for side, run in pair.items():
            robust = len(x) - int(run["fooled"].sum())
            print(f"{side:<20}{robust:>8}{robust / total:>9.2%}{run['seconds']:>10.1f}", end="")
            print(f"{run['forwards']:>11}{run['backwards']:>11}", flush=True)
        ours, theirs = pair[own]["fooled"], pair[ATTACKS[own]]["fooled"]
        alone = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
        print(f"  fooled by {own} alone {alone[0]}, by {ATTACKS[own]} alone {alone[1]}", flush=True)


if __name__ == "__main__":
    main()
