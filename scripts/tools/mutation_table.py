"""Plants faults into the attacks and their tools, one at a time, and prints the test that finds each.

    python scripts/tools/mutation_table.py [--only WORD] > docs/mutation_table.md

Each fault is a change of source text in a copy of the checkout; the tests named with it run there until the
first fails. Ends with status 1 if one survives. Needs about 8 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONTRACT = "tests/contract/test_attacks.py"
PARITY = "tests/reference/test_parity.py"
THREAT = "tests/core/test_threat.py"
ROWS = "tests/attack_api/test_row_wise.py"
SQUARE = "tests/attacks/test_square.py"
FAB = "tests/attacks/test_fab.py"
BATCH = "tests/engine/test_continuous_batch.py"
CWA = "tests/reference/test_cwa.py"
SURROGATES = "tests/attack_api/test_surrogates.py"
TRANSFER = "tests/attack_api/test_composition.py"


@dataclass(frozen=True)
class Fault:
    """A sentence, the file, the changes (old text, new text), and where to look for the test that finds it."""

    name: str
    file: str
    changes: tuple[tuple[str, str], ...]
    tests: str
    only: str = ""


FAULTS = [
    Fault(
        "a projection clamps the tensor instead of the factor",
        "robustkit/core/threat.py",
        (("shift * (radius * (1 - 1e-12) / length).clamp", "(shift * (radius * (1 - 1e-12) / length)).clamp"),),
        THREAT,
    ),
    Fault(
        "a radius per sample is broadcast along the width",
        "robustkit/core/threat.py",
        (("x.double(), per_row(radii, x)", "x.double(), radii"),),
        CONTRACT,
        "fmn",
    ),
    Fault(
        "an attack returns its input",
        "robustkit/attack_api/driver.py",
        (("self.x[position] = torch.where(per_row(better, x), x, self.x[position])", "pass"),),
        CONTRACT,
        "succeeds_where_possible",
    ),
    Fault(
        "the last step leaves the ball",
        "attacks/gradient/pgd.py",
        (
            (
                "rows.project(rows.threat.step(x, gradient, length, density=self.density))",
                "rows.threat.step(x, gradient, length, density=self.density)",
            ),
        ),
        CONTRACT,
        "pgd",
    ),
    Fault(
        "a flipped sign",
        "attacks/gradient/apgd.py",
        (("point + size *", "point - size *"),),
        CONTRACT,
        "apgd",
    ),
    Fault(
        "the global generator is used",
        "attacks/gradient/apgd.py",
        (("noise = 2 * rows.rng.uniform(*shape) - 1", "noise = 2 * torch.rand(x.shape) - 1"),),
        CONTRACT,
        "apgd and generator",
    ),
    Fault(
        "`steps` is ignored",
        "robustkit/attack_api/row_wise.py",
        (("LoopOptions(self.steps, ", "LoopOptions(10, "),),
        CONTRACT,
        "mi-fgsm",
    ),
    Fault(
        "a momentum is not reset between samples",
        "attacks/transfer/mi_fgsm.py",
        (
            ("@attack(", "KEPT = {}\n\n\n@attack("),
            ("torch.zeros_like(rows.x)}", "KEPT.setdefault(rows.x.shape, torch.zeros_like(rows.x))}"),
            (
                'self.momentum * state["velocity"] + gradient',
                'state["velocity"].mul_(self.momentum).add_(gradient)',
            ),
        ),
        CONTRACT,
        "mi-fgsm",
    ),
    Fault(
        "success is judged by the attack's own target",
        "robustkit/attack_api/driver.py",
        (("reached = rows.goal.reached(answer", "reached = rows.aim.reached(answer"),),
        ROWS,
    ),
    Fault(
        "a success outside the ball counts",
        "robustkit/attack_api/driver.py",
        (("if self.options.queries_outside_ball:", "if False:"),),
        ROWS,
    ),
    Fault(
        "only the first restart is run",
        "robustkit/attack_api/driver.py",
        (("range(options.restarts * (", "range(1 * ("),),
        CONTRACT,
        "budget or number_of_steps",
    ),
    Fault(
        "rows that succeeded go on",
        "robustkit/attack_api/driver.py",
        (("leave = self.margin == torch.inf", "leave = self.margin > torch.inf"),),
        ROWS,
        "queried_no_more",
    ),
    Fault(
        "apgd: the first loss is compared with the start's, not with zero",
        "attacks/gradient/apgd.py",
        (("torch.where(begins, 0, loss)", "loss"),),
        PARITY,
        "apgd",
    ),
    Fault(
        "apgd: no return to the best point when the step is halved",
        "attacks/gradient/apgd.py",
        (('point = _pick(halve, state["best"], point)', "pass"),),
        PARITY,
        "apgd",
    ),
    Fault(
        "apgd: momentum at the first step already",
        "robustkit/attack_api/rows.py",
        (("np.where(first, 1.0, momentum)", "np.where(first, momentum, momentum)"),),
        PARITY,
        "apgd",
    ),
    Fault(
        "apgd in l1: one stage of three is left out",
        "attacks/gradient/apgd.py",
        (("(2, most), ", "(3, most), "),),
        PARITY,
        "apgd",
    ),
    Fault(
        "apgd: step size and best point go by the last draw",
        "robustkit/attack_api/row_wise.py",
        (("torch.stack(parts).mean(0)", "parts[-1]"),),
        ROWS,
    ),
    Fault(
        "fab: points beyond the boundary are not drawn back",
        "attacks/gradient/fab.py",
        (("x + self.beta * (state", "x + 1.0 * (state"),),
        PARITY,
        "fab",
    ),
    Fault(
        "fab: the projection forgets the box",
        "attacks/gradient/fab.py",
        (
            (
                "torch.minimum(torch.where(size > 0, time, 0) * rate, room.double())",
                "(torch.where(size > 0, time, 0) * rate)",
            ),
        ),
        FAB,
    ),
    Fault(
        "fab in l1: the lightest coordinates move first",
        "attacks/gradient/fab.py",
        (("size.sort(dim=1, descending=True)", "size.sort(dim=1)"),),
        FAB,
    ),
    Fault(
        "square: one window for the whole batch",
        "attacks/score/square.py",
        (("(draws.double() *", "(draws[:1].double() *"),),
        SQUARE,
    ),
    Fault(
        "square: a worse point replaces the best",
        "attacks/score/square.py",
        (('better = score > state["score"]', "better = score < torch.inf"),),
        SQUARE,
    ),
    Fault(
        "square: the windows do not shrink",
        "attacks/score/square.py",
        (("/ 2**halvings", "/ 2**0"),),
        SQUARE,
    ),
    Fault(
        "fmn: the radius grows from adversarial points too",
        "attacks/gradient/fmn.py",
        (('torch.minimum(state["radius"] * (1 - gamma), nearest)', 'state["radius"] * (1 + gamma)'),),
        CONTRACT,
        "fmn",
    ),
    Fault(
        "ddn: the step size does not fall",
        "attacks/gradient/ddn.py",
        (("0.01 + 0.99 * share", "1.0 + 0.0 * share"),),
        PARITY,
        "ddn",
    ),
    Fault(
        "continuous batch: a refused claim is the sample's last",
        "robustkit/engine/batching/attack_sequence.py",
        (('part["when"].index_fill_(0, there, -1)', "pass"),),
        BATCH,
    ),
    Fault(
        "queries: answers are in another order",
        "robustkit/engine/batching/forward_passes.py",
        (
            (
                "whole = whole.index_copy(0, one.index, one.outputs)",
                "whole = torch.cat([one.outputs for one in passes])",
            ),
        ),
        BATCH,
    ),
    Fault(
        "continuous batch: every job has the first one's random numbers",
        "robustkit/engine/batching/attack_sequence.py",
        (("restart=restart, step", "restart=0, step"),),
        BATCH,
    ),
    Fault(
        "continuous batch: borderline images are not attacked again",
        "robustkit/engine/evaluation/block_runner.py",
        (("BORDERLINE_SHARE = 0.05", "BORDERLINE_SHARE = 0.0"),),
        BATCH,
    ),
    Fault(
        "square: patience ends every sample",
        "attacks/score/square.py",
        (("self.rivalry, 0.0)", "1e9, 0.0)"),),
        SQUARE,
    ),
    Fault(
        "cwa: the inner momentum starts again in each step",
        "attacks/common_weakness/mi_cse.py",
        (("self.velocities.get(walk, torch.zeros_like(x))", "torch.zeros_like(x)"),),
        CWA,
        "golden or w2",
    ),
    Fault(
        "cwa: there and back share one momentum",
        "attacks/common_weakness/mi_cse.py",
        (
            ("self.velocities.get(walk,", "self.velocities.get(0,"),
            ("self.velocities[walk] =", "self.velocities[0] ="),
        ),
        CWA,
        "back",
    ),
    Fault(
        "cwa: the step back goes forward",
        "attacks/common_weakness/mi_sam.py",
        (("return x - reverse *", "return x + reverse *"),),
        CWA,
        "golden or w4",
    ),
    Fault(
        "cwa: the way back is not taken",
        "attacks/common_weakness/mi_cse.py",
        (("[listed, listed[::-1]] if", "[listed, listed] if"),),
        CWA,
        "w8",
    ),
    Fault(
        "cwa: one random order for all steps",
        "attacks/common_weakness/mi_cse.py",
        (('split_rng(rows, "order").rng, ids', 'split_rng(rows, "order").rng.at(step=0), ids'),),
        CWA,
        "w8",
    ),
    Fault(
        "cwa: a random order depends on the batch",
        "attacks/common_weakness/mi_cse.py",
        (("ids=torch.zeros(1, dtype=torch.int64)", "ids=rows.rng.ids[:1]"),),
        CWA,
        "w5 or order",
    ),
    Fault(
        "cwa: the gain is counted from after the step back",
        "attacks/common_weakness/mi_cse.py",
        (("ends.append(point - x)", "ends.append(point - start)"),),
        CWA,
        "golden",
    ),
    Fault(
        "cwa: inner gradients keep their size",
        "attacks/common_weakness/mi_cse.py",
        (("gradient if rule.raw else unit(gradient)", "gradient"),),
        CWA,
        "golden",
    ),
    Fault(
        "cwa: inner steps leave the ball",
        "attacks/common_weakness/mi_cse.py",
        (("rows.retract(point + length * velocity)", "point + length * velocity"),),
        CWA,
        "w11 or w17",
    ),
    Fault(
        "cwa: the official form averages logits",
        "attacks/common_weakness/mi_sam.py",
        (("return x.new_ones(len(", "return 1 / 3 * x.new_ones(len("),),
        CWA,
        "golden or w16",
    ),
    Fault(
        "cwa: the official outer step is divided by the norm of the batch",
        "attacks/transfer/mi_fgsm.py",
        ((".abs().sum(1)", ".abs().sum().expand(len(rows.x))"),),
        CWA,
        "w6",
    ),
    Fault(
        "cwa: weights of the ensemble stop at the step back",
        "attacks/common_weakness/mi_cse.py",
        (("per_row(paces[member], x) * along", "along"),),
        CWA,
        "weights",
    ),
    Fault(
        "cwa: Adam without its first steps' correction",
        "attacks/common_weakness/mi_cse.py",
        (("velocity / per_row(1 - 0.9**taken, velocity)", "velocity"),),
        CWA,
        "adam",
    ),
    Fault(
        "mi-sam: the official form forgets the first gradient",
        "attacks/common_weakness/mi_sam.py",
        (("return first + self.inner", "return self.inner"),),
        CWA,
        "w16",
    ),
    Fault(
        "surrogates: streamed members are combined each by itself",
        "robustkit/attack_api/surrogates.py",
        (("len(chosen) > 1 and self.combine in SHARED", "len(chosen) > 9 and self.combine in SHARED"),),
        SURROGATES,
    ),
    Fault(
        "surrogates: members chosen in another order have the first ones' weights",
        "robustkit/attack_api/surrogates.py",
        (("chosen == list(range(len(self)))", "len(chosen) == len(self)"),),
        SURROGATES,
    ),
    Fault(
        "surrogates: probabilities are averaged before the logarithm",
        "robustkit/attack_api/surrogates.py",
        (
            (
                "(logits.log_softmax(2) + shares[:, :, None].log()).logsumexp(0)",
                "(shares[:, :, None] * logits.softmax(2)).sum(0).log()",
            ),
        ),
        SURROGATES,
    ),
    Fault(
        "surrogates: tiny and huge gradients are summed as they are",
        "robustkit/attack_api/surrogates.py",
        (("torch.where(largest > 0, largest, 1)", "torch.ones_like(largest)"),),
        SURROGATES,
        "normalised or tiny",
    ),
    Fault(
        "transfer: the rightmost technique is the outermost",
        "robustkit/attack_api/composition.py",
        (("for technique in reversed(techniques)", "for technique in techniques"),),
        TRANSFER,
    ),
    Fault(
        "transfer: all calls of a step have the same random numbers",
        "robustkit/attack_api/oracles.py",
        (("{rows.rng.stream}/{name}{number}", "{rows.rng.stream}/{name}"),),
        TRANSFER,
    ),
    Fault(
        "transfer: the end is the next query point",
        "robustkit/attack_api/composition.py",
        (('state.get("point", state["x"])', 'state["x"]'),),
        TRANSFER,
    ),
]


def killer(fault: Fault) -> str | None:
    """Return the first test that fails with the fault planted in a copy of the checkout."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("robustkit", "attacks", "defenses", "tests", "setup.cfg"):
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / name)
        file = copy / fault.file
        text = file.read_text()
        for old, new in fault.changes:
            if text.count(old) < 1:
                raise SystemExit(f"{fault.name}: {fault.file} no longer has {old!r}")
            text = text.replace(old, new, 1)
        file.write_text(text)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", fault.tests]
        command += ["-k", fault.only] if fault.only else []
        environment = {**os.environ, "PYTHONPATH": str(copy)}
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
        if done.returncode not in (0, 1):
            raise SystemExit(done.stdout + done.stderr)
        found = re.search(r"^(?:FAILED|ERROR) \S*::(.*?)(?: - .*)?$", done.stdout, re.MULTILINE)
        return f"{fault.tests.rpartition('/')[2]}::{found[1]}" if found else None


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="faults whose name has this word")
    arguments = parser.parse_args()
    print("# Planted faults and the tests that find them\n")
    print(
        "Made by `python scripts/tools/mutation_table.py`. "
        "The contract tests plant more, as classes, in every run.\n"
    )
    print("| fault | in | found by |")
    print("|---|---|---|")
    alive = 0
    for fault in FAULTS:
        if arguments.only in fault.name:
            test = killer(fault)
            alive += test is None
            print(f"| {fault.name} | `{fault.file}` | {f'`{test}`' if test else '**nothing**'} |", flush=True)
    raise SystemExit(1 if alive else 0)


if __name__ == "__main__":
    main()
