"""Small nets and small sets: CPU seconds and passes of AutoAttack and of robustkit's suites on the same images.

    python scripts/benchmarks/bench_small_nets.py --zoo zoo --mnist mnist.npz --cifar cifar10_test.npz \
        --nets DIR [--only REGEX] [--suites auto rapid] [--theirs FILE.json]

AutoAttack is the authors' package (pyautoattack), version `standard`, with its published settings and batches of
250. Both sides search in float32 on one thread, one after the other in one process, without a run folder. A row
says: images, robust accuracy, passes (forward and backward) and CPU seconds (of the process) an image, how many
times as many AutoAttack takes, and how many images only AutoAttack fools. Where the table says so AutoAttack gets
only the first of the images: its cost of an image does not depend on how many there are. With --theirs its side is
kept in a file and measured once. The zoo is made by scripts/reproductions/train_zoo.py, DIR has `resnet20` and
`resnet20-at` on CIFAR-10.

Hardware: one CPU core; about an hour for all rows, most of it AutoAttack's.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from pyautoattack import AutoAttack

sys.path.insert(0, str(Path(__file__).parents[1] / "reproductions"))

from train_zoo import ZOO

from robustkit import evaluate, load_data, load_model
from robustkit.core.threat import ThreatModel
from robustkit.data.samples import Samples
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.models.classifier import Classifier

NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
AUTOATTACK_BATCH = 250


@dataclass(frozen=True)
class Row:
    """A net, how many images robustkit gets, how many of them AutoAttack gets, and the ratio that is aimed at."""

    net: str
    images: int
    theirs: int
    aim: float

    def model(self, arguments: argparse.Namespace) -> tuple[Classifier, str, str]:
        """Return the net, the name of its data set and its threat."""
        if self.net == "digits-cnn":
            return load_model("robustkit:digits-cnn"), "digits", "linf:0.15"
        if self.net.startswith("resnet"):
            kind = self.net.partition("-")[0]
            file = arguments.nets / f"{self.net}.safetensors"
            return load_model(f"robustkit:cifar-{kind}@{file}"), "cifar", "linf:8/255"
        entry = next(entry for entry in ZOO if entry.name == self.net)
        return load_model(f"{arguments.zoo / self.net}/", trust_code=True), entry.data, entry.threat


ROWS = [
    Row("digits-cnn", 200, 200, 8),
    Row("digits-plain-mlp", 200, 200, 3),
    Row("mnist-ibp-mlp", 64, 64, 3),
    Row("cifar-free-wrn", 64, 64, 12),
    Row("cifar-plain-vit", 64, 64, 1),
    Row("resnet20-at", 64, 64, 12),
    Row("resnet20", 128, 64, 30),
    Row("resnet20", 1000, 64, 50),
]


@dataclass(frozen=True)
class Result:
    """What one side did on n images: which are fooled, passes in all, CPU seconds in all."""

    n: int
    fooled: list[int]
    passes: int
    seconds: float

    @property
    def robust(self) -> float:
        """Robust accuracy."""
        return 1 - len(self.fooled) / self.n


def by_autoattack(model: Classifier, samples: Samples, threat: ThreatModel) -> Result:
    """Run pyautoattack's standard version as its authors call it."""
    x, y = samples.images(range(len(samples))), torch.from_numpy(samples.labels)
    instrumented = InstrumentedModel(model, torch.device("cpu"))
    attack = AutoAttack(
        instrumented, norm=NORMS[threat.norm], eps=float(threat.eps), seed=0, version="standard", device="cpu"
    )
    attack.logger.log = lambda *_: None
    begun = time.process_time()
    x_adv, _ = attack.run_standard_evaluation(x, y, batch_size=min(AUTOATTACK_BATCH, len(x)))
    seconds = time.process_time() - begun
    with torch.no_grad():
        fooled = (model(x_adv).argmax(1) != y).nonzero()[:, 0].tolist()
    return Result(len(x), fooled, instrumented.forwards + instrumented.backwards, seconds)


def by_robustkit(model: Classifier, samples: Samples, threat: ThreatModel, suite: str) -> Result:
    """Run a suite in float32."""
    begun = time.process_time()
    report = evaluate(model, samples, threat=threat, suite=suite, precision="fp32")
    seconds = time.process_time() - begun
    fooled = [verdict.index for verdict in report.verdicts if not verdict.robust]
    return Result(report.n, fooled, report.cost.forwards + report.cost.backwards, seconds)


def main() -> None:
    """Print a line for each net and suite."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument("--mnist", required=True)
    parser.add_argument("--cifar", required=True)
    parser.add_argument("--nets", type=Path, required=True)
    parser.add_argument("--only", default="", help="a regular expression that the net's name must match")
    parser.add_argument("--suites", nargs="+", default=["auto", "rapid"])
    parser.add_argument("--theirs", type=Path, help="a file that keeps AutoAttack's side")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kept = json.loads(arguments.theirs.read_text()) if arguments.theirs and arguments.theirs.exists() else {}
    print(f"$ python {' '.join(sys.argv)}\ntorch {torch.__version__}, {torch.get_num_threads()} thread\n")
    print(
        f"{'net':17} {'threat':10} {'suite':6} {'images':>6} {'AA on':>6} {'robust':>7} {'AA':>7} {'passes':>8} "
        f"{'AA':>8} {'ratio':>6} {'ms CPU':>8} {'AA':>8} {'ratio':>6} {'aim':>4} {'only AA':>7}"
    )
    for row in ROWS:
        if not re.search(arguments.only, row.net):
            continue
        model, data, threat = row.model(arguments)
        # Both sides get the same net, without gradients of parameters.
        model = model.requires_grad_(False).eval()
        source = {"digits": "digits:test", "mnist": arguments.mnist, "cifar": arguments.cifar}[data]
        samples = load_data(source).head(row.images)
        key = f"{row.net} {row.theirs}"
        if key not in kept:
            kept[key] = asdict(by_autoattack(model, samples.head(row.theirs), ThreatModel.parse(threat)))
            if arguments.theirs:
                arguments.theirs.write_text(json.dumps(kept))
        theirs = Result(**kept[key])
        for suite in arguments.suites:
            ours = by_robustkit(model, samples, ThreatModel.parse(threat), suite)
            missed = len(set(theirs.fooled) - set(ours.fooled))
            passes = [side.passes / side.n for side in (ours, theirs)]
            cost = [1000 * side.seconds / side.n for side in (ours, theirs)]
            print(
                f"{row.net:17} {threat:10} {suite:6} {ours.n:6} {theirs.n:6} "
                f"{ours.robust:7.1%} {theirs.robust:7.1%} "
                f"{passes[0]:8,.0f} {passes[1]:8,.0f} {passes[1] / passes[0]:6.1f} "
                f"{cost[0]:8,.1f} {cost[1]:8,.1f} {cost[1] / cost[0]:6.1f} {row.aim:4g} {missed:7}",
                flush=True,
            )


if __name__ == "__main__":
    main()
