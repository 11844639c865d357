"""Transfer attacks at equal gradient budgets, on the same surrogates, images and targets; torchattacks' too.

    python scripts/benchmarks/bench_transfer.py --surrogate MODEL ... --target MODEL ... --data FILE.npz --limit N
        [--first M] [--threat T ...] [--budget 40 400] [--attack A ...] [--combine C ...] [--torchattacks]

Each attack takes as many steps as the budget pays for (a gradient of one member for one image costs 1), of its own
step size but at least eps / steps. Printed: steps, gradients per image, images per second, and on each target the
share of images that it classifies correctly which are fooled, with 95 % Wilson intervals. `--combine` is how
members are made one where the attack leaves that open. torchattacks' attacks get the members' mean of logits,
their published settings, a step size of eps / 4 and as many steps; it pins an old requests, so install it with
--no-deps in an environment of its own. See scripts/results/.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustkit.attack_api import compose
from robustkit.attack_api.surrogates import COMBINATIONS
from robustkit.core.criteria import Goal
from robustkit.core.rng import RowRng
from robustkit.core.threat import ThreatModel
from robustkit.crafting.ensemble import Ensemble, Storage
from robustkit.crafting.judging import TargetEvaluator
from robustkit.data import load_data
from robustkit.data.samples import Samples
from robustkit.engine.gradient_budgets import Prices
from robustkit.engine.model.loaded_models import Net, gather
from robustkit.models import load_model
from robustkit.registry import parse_attack
from robustkit.runs.report_parts import Rate

CPU = torch.device("cpu")
BATCH = 64
ATTACKS = (
    "auto",
    "i-fgsm(step_size=0.2)",
    "mi-fgsm(step_size=0.2)",
    "ni-fgsm(step_size=0.2)",
    "pgd(step_size=0.2)",
    "mi-fgsm(step_size=0.2)+di",
    "mi-fgsm(step_size=0.2)+ti",
    "mi-fgsm(step_size=0.2)+si",
    "mi-fgsm(step_size=0.2)+admix",
    "mi-fgsm(step_size=0.2)+ssa(copies=5)",
    "mi-fgsm(step_size=0.2)+block-shuffle",
    "mi-fgsm(step_size=0.2)+vmi(copies=5)",
    "ni-fgsm(step_size=0.2)+vmi(copies=5)",
    "mi-fgsm(step_size=0.2)+pgn(copies=5)",
    "mi-fgsm(step_size=0.2)+svre",
    "mi-fgsm(step_size=0.2)+adaea",
    "mi-fgsm(step_size=0.2)+smer",
    "mi-fgsm(step_size=0.2)+ghost",
    "mi-fgsm(step_size=0.2)+sgm(gamma=0.5)",
    "mi-sam(step_size=0.2)",
    "mi-cse(step_size=0.2)",
    "cwa(step_size=0.2)",
    "cwa(step_size=0.2,order=random)",
)
# torchattacks' classes, what else they are given, and their gradients per step for one member.
THEIRS: dict[str, tuple[dict[str, Any], int]] = {
    "MIFGSM": ({}, 1),
    "NIFGSM": ({}, 1),
    "DIFGSM": ({}, 1),
    "TIFGSM": ({}, 1),
    "SINIFGSM": ({}, 5),
    "VMIFGSM": ({}, 6),
    "VNIFGSM": ({}, 6),
}


class Mean(nn.Module):
    """The mean of the members' logits, as users of torchattacks make an ensemble."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return torch.stack([member(x) for member in self.members]).mean(0)


def batches(samples: Samples) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
    """Yield positions, images and labels."""
    for positions in np.split(np.arange(len(samples)), range(BATCH, len(samples), BATCH)):
        yield positions, samples.images(positions), torch.from_numpy(samples.labels[positions])


class Comparison:
    """Surrogates, images and targets, and the targets' predictions on the clean images."""

    def __init__(self, surrogates: list[Net], targets: list[Net], samples: Samples, combine: str) -> None:
        self.nets, self.targets, self.samples = surrogates, targets, samples
        self.ensembles = {
            hooked: Ensemble(surrogates, CPU, Storage(loaded=True, held=True), combine) for hooked in (False, True)
        }
        x = self.pool = samples.images(np.arange(min(BATCH, len(samples))))
        for hooked, ensemble in self.ensembles.items():
            ensemble.tune(x, lambda configs: configs, hooked=hooked)
        clean = np.concatenate([x.numpy() for _, x, _ in batches(samples)])
        self.right = {net.string: self.predictions(net, clean) == samples.labels for net in targets}

    def predictions(self, net: Net, images: np.ndarray) -> np.ndarray:
        """Return the class that a target names for each image."""
        evaluator = TargetEvaluator(self.samples, ThreatModel.parse("linf:0.1"), None, 0, CPU)
        return np.array(evaluator.predictions(net, images))

    def row(self, name: str, steps: int, spent: float, seconds: float, images: np.ndarray) -> None:
        """Print what some images did."""
        cells = []
        for net in self.targets:
            right = self.right[net.string]
            rate = Rate.of(
                int((self.predictions(net, images) != self.samples.labels)[right].sum()), int(right.sum())
            )
            cells.append(f"{100 * rate.value:5.1f} ({100 * rate.low:4.1f}-{100 * rate.high:4.1f})")
        speed = len(images) / seconds
        print(f"{name:<44}{steps:>5}{spent:>7.0f}{speed:>7.1f}  " + "  ".join(cells), flush=True)

    def ours(self, text: str, threat: ThreatModel, budget: int) -> None:
        """Craft with an attack of ours."""
        attack: Any = compose(parse_attack(text, threat.norm))
        ensemble = self.ensembles[any(word in text for word in ("+ghost", "+sgm"))]
        few = next(batches(self.samples))

        def gradients_per_image_of(changed: Any) -> int:
            before = ensemble.counts[1]
            self._craft(changed, ensemble, threat, few[0][:1], few[1][:1], few[2][:1])
            return ensemble.counts[1] - before

        point, changed = Prices.of(attack, gradients_per_image_of).point(attack, budget, float(threat.eps))
        if changed is None or point.steps is None:
            print(f"{text:<44}    – one step costs more than {budget}", flush=True)
            return
        before, begun = ensemble.counts[1], time.perf_counter()
        parts = [self._craft(changed, ensemble, threat, *batch) for batch in batches(self.samples)]
        seconds = time.perf_counter() - begun
        spent = (ensemble.counts[1] - before) / len(self.samples)
        self.row(text, point.steps, spent, seconds, np.concatenate(parts))

    def _craft(
        self, attack: Any, ensemble: Ensemble, threat: ThreatModel, positions: np.ndarray, x: Tensor, y: Tensor
    ) -> np.ndarray:
        with ensemble.in_eval_mode():
            rng = RowRng(0, "bench", torch.from_numpy(positions))
            surrogates = replace(ensemble.surrogates(), pool=self.pool)
            made: Tensor = attack(surrogates, x, Goal(y), threat, rng=rng)
        return made.numpy()

    def theirs(self, name: str, build: Callable[..., Any], threat: ThreatModel, budget: int) -> None:
        """Craft with an attack of torchattacks'."""
        more, price = THEIRS[name]
        steps, eps = budget // (price * len(self.nets)), float(threat.eps)
        if not steps:
            print(f"torchattacks {name:<31}    – one step costs more than {budget}", flush=True)
            return
        torch.manual_seed(0)
        net = Mean([load_model(one.string) for one in self.nets]).eval()
        attack = build(net, eps=eps, alpha=max(eps / 4, eps / steps), steps=steps, **more)
        begun = time.perf_counter()
        parts = [attack(x, y).detach().numpy() for _, x, y in batches(self.samples)]
        spent = steps * price * len(self.nets)
        self.row(f"torchattacks {name}", steps, spent, time.perf_counter() - begun, np.concatenate(parts))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--surrogate", action="append", required=True)
    parser.add_argument("--target", action="append", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--limit", type=int, required=True)
    parser.add_argument("--threat", nargs="+", default=["linf:8/255"])
    parser.add_argument("--budget", type=int, nargs="+", default=[40, 400])
    parser.add_argument("--attack", nargs="+", default=ATTACKS)
    parser.add_argument("--combine", nargs="+", choices=COMBINATIONS, default=["consensus"])
    parser.add_argument("--torchattacks", action="store_true")
    given = parser.parse_args()
    samples = load_data(given.data)
    samples = samples.pick(np.arange(given.first, given.first + given.limit))
    surrogates = gather(given.surrogate, samples, CPU)
    targets = gather(given.target, samples, CPU, what="target")
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {len(samples)} images from {given.first}"
    )
    for combine in given.combine:
        comparison = Comparison(surrogates, targets, samples, combine)
        for wanted, budget in itertools.product(given.threat, given.budget):
            threat = ThreatModel.parse(wanted)
            names = "  ".join(f"{net.string.rpartition('/')[2]:<17}" for net in targets)
            print(f"\n{threat}, at most {budget} gradients per image, combine {combine}")
            print(f"{'attack':<44}{'steps':>5}{'grads':>7}{'img/s':>7}  {names}", flush=True)
            for attack in given.attack:
                comparison.ours(attack, threat, budget)
            if given.torchattacks and combine == given.combine[0]:
                import torchattacks

                for name in THEIRS:
                    comparison.theirs(name, getattr(torchattacks, name), threat, budget)


if __name__ == "__main__":
    main()
