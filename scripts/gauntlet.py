"""Masked defenses around small nets: what is true, what plain AutoAttack says, what the default suite says.

    python scripts/gauntlet.py [--images 64] [--only NAME ...] [--official]         minutes to an hour on one core
    python scripts/gauntlet.py --model MODEL --data FILE.npz --threat linf:8/255    the same masks around any model

The defenses are those of tests/gauntlet.py around a net trained on digits for seconds, at linf 0.08. `beneath` is
the robust accuracy of that net alone (suite `rapid`): what a mask hides. A defense that also changes what the net
sees may be truly a little better or worse than that. Then: AutoAttack's `standard` suite by the authors' package
(with --official), robustkit's `rapid` and `auto`, and the flags of `auto` that tell of masking. The last rows are
honest nets, and those before them nets with a mask of their own; a given model has neither.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from robustkit import evaluate, load_model
from robustkit.data import load_data
from robustkit.record import Report
from tests import gauntlet

TOLD = {"masked-gradient", "randomised", "score-beats-gradient", "zero-gradient"}
TOLD |= {"vanishing-gradient", "wrong-gradient", "survives-any-eps", "no-gradient", "saturated-softmax"}


Pairs = dict[str, tuple[nn.Module, nn.Module]]


def around(net: nn.Module) -> Pairs:
    """Return masks around a net by name, each with the net beneath."""
    return {name: (gauntlet.Behind(net, call).eval(), net) for name, call in gauntlet.AROUND.items()}


def small() -> Pairs:
    """Return defenses around small nets, and honest ones."""
    data = load_data("digits:train")
    x, y = data.images(range(len(data))), torch.from_numpy(data.labels)
    plain = gauntlet.trained(gauntlet.Digits(), x, y)
    hardened = gauntlet.trained(gauntlet.Digits(), x, y, attack=0.08)
    found = around(plain)
    for how in ("threshold", "scatter"):
        winners = gauntlet.trained(gauntlet.Digits(lambda how=how: gauntlet.KWinners(how=how)), x, y)
        found[f"k-winners-{how}"] = (winners, plain)
    steep = gauntlet.trained(gauntlet.Digits(), x, y)
    steep.act1 = steep.act2 = gauntlet.Activation(lambda z: torch.relu(z) + 0.05 * torch.tanh(1e4 * z))
    found["steep-activation"] = (steep, plain)
    skipping = gauntlet.trained(gauntlet.Digits(), x, y)
    skipping.skip = 0.7
    found["stochastic-depth"] = (skipping, plain)
    several = [gauntlet.trained(gauntlet.Digits(seed=seed), x, y, seed=seed) for seed in range(5)]
    mean = gauntlet.Several(several, lambda stack: stack.mean(1))
    found["crossmax"] = (gauntlet.Several(several, gauntlet.crossmax), mean)
    found["honest: plain"] = (plain, plain)
    found["honest: adversarially trained"] = (hardened, hardened)
    found["honest: mean of five"] = (mean, mean)
    return found


def percent(report: Report) -> str:
    """Return the robust accuracy in percent, with its interval."""
    rate = report.robust_accuracy
    return f"{100 * rate.value:5.1f} ({100 * rate.low:.0f}-{100 * rate.high:.0f})"


def main() -> None:
    """Evaluate each defense and print a row for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--model", help="a model string, in place of the small nets")
    parser.add_argument("--data", default="digits:test")
    parser.add_argument("--threat", default="linf:0.08")
    parser.add_argument("--official", action="store_true", help="run AutoAttack standard as well")
    given = parser.parse_args()
    torch.set_num_threads(1)
    data = load_data(given.data).head(given.images)
    x, y = data.images(range(len(data))), torch.from_numpy(data.labels)
    pairs = small() if given.model is None else around(load_model(given.model))
    print(f"torch {torch.__version__}, {len(x)} images, {given.threat}\n")
    print(f"{'defense':32}{'beneath':>17}{'AutoAttack':>17}{'rapid':>17}{'auto':>17}  seconds  flags")
    for name, (defense, net) in pairs.items():
        if given.only and name not in given.only:
            continue
        begun = time.perf_counter()
        suites = {"beneath": (net, "rapid"), "AutoAttack": (defense, "autoattack"), "rapid": (defense, "rapid")}
        if not given.official:
            del suites["AutoAttack"]
        cells = {
            what: percent(evaluate(model, x, y, given.threat, suite=suite))
            for what, (model, suite) in suites.items()
        }
        found = evaluate(defense, x, y, given.threat, suite="auto")
        flags = sorted({flag.code for flag in found.flags} & TOLD)
        row = [cells["beneath"], cells.get("AutoAttack", "-"), cells["rapid"], percent(found)]
        spent = time.perf_counter() - begun
        print(f"{name:32}{''.join(f'{cell:>17}' for cell in row)}  {spent:7.0f}  {', '.join(flags)}", flush=True)


if __name__ == "__main__":
    main()
