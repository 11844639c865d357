"""Masked defenses around small nets: what is true, what plain AutoAttack says, what the default suite says.

    python scripts/benchmarks/gauntlet.py [--images 12] [--only NAME ...] [--half open|aside] [--record FILE]
    python scripts/benchmarks/gauntlet.py --model MODEL --data FILE.npz --threat linf:8/255   masks that go \
        around any model
    python scripts/benchmarks/gauntlet.py --model MODEL --data FILE.npz --threat ... --unmasked  the model as it is

The defenses are those of tests/masked_defenses.py and tests/known_masks.py, on digits at linf 0.15, and unmasked
nets.
Robust accuracies are in percent:

    beneath     the net that a mask is put around, alone (suite `rapid`); a mask that changes what the net sees
                may be truly a little better or worse
    truth       the defense after the strongest attacks known for it: long ascent on the gradients of stand-ins
                written for the mask, or an attack of its own (ARC), and what the others found
    AutoAttack  the `standard` suite by the authors' package; with --fast its two APGDs alone
    auto        the default suite; with --fast all of `adaptive` without arms and Square
    flags       the warnings of `auto`

Masks of tests/known_masks.py whose names have an even SHA-256 had no part in composing checks and views
(`--half aside`). With --record each row is added to a file for scripts/benchmarks/flags.py. A minute or two for a
mask on one core.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

import known_masks
import masked_defenses
from known_masks import Exporting, Masked

from robustkit import ThreatModel, evaluate, load_model
from robustkit.data import load_data
from robustkit.registry import find
from robustkit.runs.evaluation_record import Report

Row = tuple[Masked, nn.Module | None]
Made = dict[str, Callable[[], Row]]


def around(net: nn.Module) -> Made:
    """Return how to make masks around a net, each with the net beneath."""

    def bare(call: known_masks.Call) -> Row:
        return Masked(masked_defenses.MaskedNet(net, call), {"bare": net}), net

    def known(name: str) -> Row:
        return known_masks.around(name, net), net

    made: Made = {name: partial(bare, call) for name, call in masked_defenses.AROUND.items()}
    return made | {name: partial(known, name) for name in known_masks.AROUND}


def small() -> Made:
    """Return how to make defenses around small nets of digits, and unmasked nets."""
    data = load_data("digits:train")
    x, y = data.images(range(len(data))), torch.from_numpy(data.labels)
    plain = masked_defenses.trained(masked_defenses.Digits(), x, y)

    def winners(how: str) -> Row:
        return Masked(
            masked_defenses.trained(masked_defenses.Digits(lambda: masked_defenses.KWinners(how=how)), x, y)
        ), plain

    def steep() -> Row:
        net = masked_defenses.trained(masked_defenses.Digits(), x, y)
        net.act1 = net.act2 = masked_defenses.Activation(lambda z: torch.relu(z) + 0.05 * torch.tanh(1e4 * z))
        return Masked(net, {"bare": plain}), plain

    def skipping() -> Row:
        net: Any = masked_defenses.trained(masked_defenses.Digits(), x, y)
        net.skip = 0.7
        return Masked(net, {"bare": plain}), plain

    def several(rule: Callable[[Tensor], Tensor]) -> masked_defenses.AggregatedNets:
        nets = [masked_defenses.trained(masked_defenses.Digits(seed=seed), x, y, seed=seed) for seed in range(5)]
        return masked_defenses.AggregatedNets(nets, rule)

    def crossmax() -> Row:
        defense = several(masked_defenses.crossmax)
        mean = masked_defenses.AggregatedNets(list(defense.nets), lambda stack: stack.mean(1))
        return Masked(defense, {"mean": mean}), mean

    def learned(make: Callable[[Tensor, Tensor], Masked]) -> Row:
        return make(x, y), None

    made = around(plain)
    made |= {f"k-winners-{how}": partial(winners, how) for how in ("threshold", "scatter")}
    made |= {"steep-activation": steep, "stochastic-depth": skipping, "crossmax": crossmax}
    made |= {name: partial(learned, make) for name, make in known_masks.LEARNED.items()}
    made["unmasked: plain"] = lambda: (Masked(plain), None)
    made["unmasked: adversarially trained"] = lambda: (
        Masked(masked_defenses.trained(masked_defenses.Digits(), x, y, attack=0.08)),
        None,
    )
    made["unmasked: mean of five"] = lambda: (Masked(several(lambda stack: stack.mean(1))), None)
    return made


def known_attacks(norm: str) -> str:
    """Return the suite that climbs a defense's stand-ins."""
    long = ["apgd(loss=margin,steps=100,restarts=2)", "apgd-t(loss=margin,steps=40,targets=9)"]
    if norm != "l1":
        long[1] = "race(targets=9,probe=4,finalists=3,steps=40,restarts=3)"
    return ",".join(f"{text}@{view}" for view in ("averaged-own", "own") for text in long)


def suites(norm: str, fast: bool) -> dict[str, str]:
    """Return the suites of the columns; the fast ones are without what costs most: arms, FAB and Square."""
    if not fast:
        return {"beneath": "rapid", "autoattack": "autoattack", "auto": "auto"}

    def cheap(name: str) -> str:
        return ",".join(text for text in find("suite", name)(norm) if "*" not in text and "square" not in text)

    apgds = "autoattack:apgd-ce,autoattack:apgd-t"
    return {"beneath": cheap("rapid"), "autoattack": apgds, "auto": cheap("adaptive")}


def judged(
    masked: Masked, beneath: nn.Module | None, x: Tensor, y: Tensor, threat: str, fast: bool, unmasked: bool
) -> dict[str, Any]:
    """Return a row: the robust images in each column, of an unmasked net only after `auto`, and its warnings."""

    def robust_images(model: nn.Module, suite: str, among: Tensor | None = None) -> tuple[Tensor, Report]:
        index = torch.arange(len(x)) if among is None else among.nonzero()[:, 0]
        report = evaluate(model, x[index], y[index], threat, suite=suite)
        robust = torch.zeros(len(x), dtype=torch.bool)
        robust[index] = torch.tensor([verdict.robust for verdict in report.verdicts])
        return robust, report

    norm = threat.partition(":")[0]
    columns = suites(norm, fast)
    auto, found = robust_images(masked.defense, columns["auto"])
    row = {"images": len(x), "threat": threat, "fast": fast, "auto": int(auto.sum())}
    row["flags"] = sorted(flag.code for flag in found.flags if flag.warns)
    if unmasked:
        return row
    published, _ = robust_images(masked.defense, columns["autoattack"])
    truth = auto & published
    if masked.substitutes and truth.any():
        truth = robust_images(Exporting(masked).eval(), known_attacks(norm), truth)[0]
    if masked.own_attack is not None:
        truth &= masked.own_attack(x, y, float(ThreatModel.parse(threat).eps))
    row |= {"truth": int(truth.sum()), "autoattack": int(published.sum())}
    if beneath is not None:
        row["beneath"] = int(robust_images(beneath, columns["beneath"])[0].sum())
    return row


def main() -> None:
    """Evaluate each defense, print a row for it and record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--half", choices=["open", "aside"], help="of the masks of tests/known_masks.py alone")
    parser.add_argument("--model", help="a model string, in place of the small nets")
    parser.add_argument("--data", default="digits:test")
    parser.add_argument("--threat", default="linf:0.15")
    parser.add_argument("--trust-code", action="store_true", help="run the Python code that a model string names")
    parser.add_argument("--unmasked", action="store_true", help="evaluate the model itself")
    parser.add_argument("--fast", action="store_true", help="leave out what costs most")
    parser.add_argument("--record", type=Path, help="a file that each row is added to, a line of JSON")
    given = parser.parse_args()
    torch.set_num_threads(1)
    data = load_data(given.data).head(given.images)
    x, y = data.images(range(len(data))), torch.from_numpy(data.labels)
    if given.model is None:
        made = small()
    else:
        net = load_model(given.model, trust_code=given.trust_code)
        made = {f"unmasked: {given.model}": lambda: (Masked(net), None)} if given.unmasked else around(net)
    known = {*known_masks.AROUND, *known_masks.LEARNED}
    print(f"torch {torch.__version__}, {len(x)} images, {given.threat}\n")
    print(f"{'defense':32}{'beneath':>9}{'truth':>9}{'AutoAttack':>12}{'auto':>9}  seconds  flags")
    for name, make in made.items():
        half = "aside" if known_masks.kept_aside(name) else "open"
        if (given.only and name not in given.only) or (given.half and (name not in known or half != given.half)):
            continue
        begun = time.perf_counter()
        row = judged(*make(), x, y, given.threat, given.fast, name.startswith("unmasked"))
        row = {"name": name, "net": given.model or "digits", "half": half if name in known else ""} | row
        columns = {"beneath": 9, "truth": 9, "autoattack": 12, "auto": 9}
        cells = (
            f"{f'{100 * row[key] / len(x):.1f}' if key in row else '-':>{width}}" for key, width in columns.items()
        )
        spent = time.perf_counter() - begun
        print(f"{name:32}{''.join(cells)}  {spent:7.0f}  {', '.join(row['flags'])}", flush=True)
        if given.record:
            with given.record.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
