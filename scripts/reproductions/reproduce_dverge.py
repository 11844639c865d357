"""DVERGE and its rivals at one budget, and what diversity does and does not buy (arXiv:2009.14720).

    python scripts/reproductions/reproduce_dverge.py --scale digits   about 20 minutes on one core
    python scripts/reproductions/reproduce_dverge.py --scale cifar-small --data DIR         hours on two cores
    python scripts/reproductions/reproduce_dverge.py --scale cifar --data DIR   as published: a GPU, days

DIR holds cifar10_train.npz and cifar10_test.npz (`x` uint8 NHWC, `y`). It trains an ensemble by each method: the
same nets to begin with, images, order, epochs, batch size. Half of DVERGE's epochs are the baseline that it starts
from. Then it prints, with 95 % Wilson intervals:

- transfer between members: PGD from each, on the images that every member of every ensemble classifies correctly;
- robust accuracy over all test images, at several eps and side by side: *black box*, images crafted on baseline
  ensembles of other seeds that no method has seen, by several attacks, a test image counting as robust if all of
  them fail; *white box*, PGD with restarts on the ensemble; *aware*, the strongest suite there is, on top of PGD;
- the same of DVERGE with more and fewer members.

An image that is fooled at one eps is fooled at every larger one, whatever the attack there finds. What is in --out
already is taken from there, so that a run that was cut off goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch

from robustkit import craft, diversity, evaluate, load_data, load_model, train
from robustkit.data.samples import Samples
from robustkit.runs.craft_record import Craft, Judgement
from robustkit.runs.diversity_record import Diversity
from robustkit.runs.report_parts import Rate
from robustkit.runs.training_record import Trained

TABLES = ("transfer", "robustness", "members")
BASELINE, DVERGE = "baseline", "DVERGE"
AWARE = "ensemble"


@dataclass(frozen=True)
class Scale:
    """What is trained and attacked.

    Attributes:
        train: data string of the training set, with {data} for the folder.
        test: of the images to attack.
        limit: of training images; None for all.
        images: how many test images are attacked.
        judged: how many tell the accuracy of what is trained.
        arch: of all nets.
        epochs: of every method.
        batch_size: likewise.
        methods: name and method string, with the learning rate.
        transfer: threat of the transfer between members.
        eps: of the other tables, in linf.
        surrogates: members of the baseline ensembles that black-box images are crafted on.
        attacks: on them.
        counts: of members, in the table of them.
        restarts: of PGD.
    """

    train: str
    test: str
    limit: int | None
    images: int
    judged: int
    arch: str
    epochs: int
    batch_size: int
    methods: dict[str, tuple[str, float]]
    transfer: str
    eps: Sequence[float]
    surrogates: Sequence[int]
    attacks: Sequence[str]
    counts: Sequence[int]
    members: int = 3
    steps: int = 50
    restarts: int = 5


def methods(eps: float, threat: str, sgd: float, adam: float) -> dict[str, tuple[str, float]]:
    """Return the methods at a distillation's eps, adversarial training's threat and two learning rates."""
    return {
        BASELINE: ("standard(schedule=steps,warmup=0,weight_decay=1e-4)", sgd),
        "ADP": ("adp", adam),
        "GAL": ("gal", adam),
        DVERGE: (f"dverge(eps={eps:g})", sgd),
        "FASTEN-style": (f"fasten(eps={eps:g})", sgd),
        "DVERGE+AT": (f"dverge(eps={eps:g},adversarial=1,threat={threat})", sgd),
    }


FILES = ("{data}/cifar10_train.npz", "{data}/cifar10_test.npz")
LONG = "mi-fgsm(steps=100,step_size=0.05)"
# The paper's: momentum PGD, with transformed images, through residual blocks; cross-entropy and margins.
ATTACKS = (LONG, "mi-fgsm(steps=100,step_size=0.05,loss=margin)", f"{LONG}+di", f"{LONG}+sgm")
SCALES = {
    # eps of the distillation and the learning rate were chosen on held-out training images.
    "digits": Scale(
        train="digits:train",
        test="digits:test",
        limit=None,
        images=200,
        judged=400,
        arch="robustkit:digits-cnn",
        epochs=40,
        batch_size=64,
        methods=methods(0.2, "linf:0.1", 0.02, 3e-3),
        transfer="linf:0.2",
        eps=(0.05, 0.1, 0.2),
        surrogates=(3, 5),
        attacks=("mi-fgsm(steps=50)", "mi-fgsm(steps=50,loss=margin)", "mi-fgsm(steps=50)+di"),
        counts=(2, 3, 5),
    ),
    "cifar-small": Scale(
        *FILES,
        limit=5000,
        images=200,
        judged=2000,
        arch="robustkit:cifar-resnet20",
        epochs=24,
        batch_size=64,
        methods=methods(0.07, "linf:8/255", 0.05, 1e-3),
        transfer="linf:0.03",
        eps=(0.01, 0.02, 0.03),
        surrogates=(3,),
        attacks=ATTACKS,
        counts=(),
        steps=20,
        restarts=2,
    ),
    "cifar": Scale(
        *FILES,
        limit=None,
        images=1000,
        judged=10_000,
        arch="robustkit:cifar-resnet20",
        epochs=400,
        batch_size=128,
        methods=methods(0.07, "linf:8/255", 0.1, 1e-3),
        transfer="linf:0.03",
        eps=(0.01, 0.02, 0.03, 0.04),
        surrogates=(3, 5, 8),
        attacks=ATTACKS,
        counts=(3, 5, 8),
    ),
}


class Study:
    """Trained ensembles and what attacks did to them, each made once and then taken from its folder."""

    def __init__(self, scale: Scale, data: Path, out: Path, device: str, seed: int) -> None:
        self.scale, self.out, self.device, self.seed = scale, out, device, seed
        self.train, self.test = (text.format(data=data) for text in (scale.train, scale.test))

    @cached_property
    def samples(self) -> Samples:
        """The images to attack."""
        return load_data(self.test).head(self.scale.images)

    def ensemble(self, name: str, method: str, lr: float, members: int, seed: int) -> Trained:
        """Train, or take what was trained."""
        say(f"training {name}: {method}")
        scale, held_out = self.scale, load_data(self.test)
        return train(
            method,
            self.train,
            test=held_out.head(min(scale.judged, len(held_out))),
            limit=scale.limit,
            arch=scale.arch,
            epochs=scale.epochs,
            batch_size=scale.batch_size,
            lr=lr,
            members=members,
            seed=seed,
            device=self.device,
            out=self.out / name,
        )

    @cached_property
    def trained(self) -> dict[str, Trained]:
        """An ensemble by each method."""
        scale = self.scale
        return {
            name: self.ensemble(folder(name), method, lr, scale.members, self.seed)
            for name, (method, lr) in scale.methods.items()
        }

    @cached_property
    def surrogates(self) -> list[str]:
        """Model strings of the baseline ensembles that no defense was trained on."""
        method, lr = self.scale.methods[BASELINE]
        for count in self.scale.surrogates:
            self.ensemble(f"surrogate-{count}", method, lr, count, self.seed + 1000 * count)
        return [f"{self.out}/surrogate-{count}/" for count in self.scale.surrogates]

    def common(self, names: Sequence[str]) -> list[int]:
        """Return the positions that every member of all these ensembles classifies correctly."""
        x = self.samples.images(np.arange(len(self.samples))).to(pick(self.device))
        labels = torch.from_numpy(self.samples.labels).to(x.device)
        right = torch.ones_like(labels, dtype=torch.bool)
        for name in names:
            model = load_model(f"{self.out}/{name}/", device=x.device)
            nets: Any = model.net
            for number in range(len(nets)):
                member = model.with_net(nets.at(number)).eval()
                with torch.no_grad():
                    right &= torch.cat([member(part) for part in x.split(500)]).argmax(1) == labels
        return right.nonzero()[:, 0].tolist()

    def compared(self, name: str, only: list[int]) -> Diversity:
        """Return how far the members of an ensemble share weaknesses."""
        say(f"members of {name} against each other")
        return diversity(
            f"{self.out}/{name}/",
            self.samples,
            None,
            self.scale.transfer,
            steps=self.scale.steps,
            restarts=self.scale.restarts,
            only=only,
            device=self.device,
            out=self.out / "diversity" / f"{name}-{crc32(repr(only).encode()):08x}",
        )

    def crafted(self, surrogate: str, attack: str, eps: float) -> Craft:
        """Return images made on a surrogate, judged on every ensemble."""
        say(f"{attack} at {eps:g} on {surrogate}")
        words = f"{Path(surrogate).name} {attack} {eps:g}"
        place = "".join(sign if sign.isalnum() or sign in ".-=" else "_" for sign in words)
        return craft(
            [surrogate],
            self.samples,
            None,
            f"linf:{eps:g}",
            attack=f"{attack}+full",
            combine="probabilities",
            targets=[f"{self.out}/{folder(name)}/" for name in self.trained],
            device=self.device,
            out=self.out / "craft" / place,
        )

    def black_box(self) -> dict[str, list[np.ndarray]]:
        """Return for each ensemble, at each eps, which images stand against all sets of crafted ones."""
        robust: dict[str, list[np.ndarray]] = {name: [] for name in self.trained}
        for eps in self.scale.eps:
            sets = [self.crafted(one, attack, eps) for one in self.surrogates for attack in self.scale.attacks]
            for name, found in robust.items():
                fooled = [self._judged(one, name).fooled(one.labels, one.goals) for one in sets]
                found.append(np.all([[hit is False for hit in row] for row in fooled], axis=0))
        return robust

    def _judged(self, record: Craft, name: str) -> Judgement:
        """Return what an ensemble made of the images; others may have been judged before it or after."""
        own = load_model(f"{self.out}/{folder(name)}/").fingerprint
        return next(one for one in record.targets if one.fingerprint == own)

    def direct(self, name: str, suite: str, label: str) -> list[np.ndarray]:
        """Return at each eps which images stand against a suite on the ensemble itself."""
        found = []
        for eps in self.scale.eps:
            say(f"{label} at {eps:g} on {name}")
            report = evaluate(
                load_model(f"{self.out}/{name}/"),
                self.samples,
                None,
                f"linf:{eps:g}",
                suite=suite,
                device=self.device,
                precision="fp32",
                out=self.out / "evaluate" / f"{name}-{label}-{eps:g}",
            )
            found.append(np.array([verdict.robust for verdict in report.verdicts]))
        return found


def folder(name: str) -> str:
    """Return a method's name as a folder's."""
    return name.lower().replace("+", "-")


def pick(device: str) -> str:
    """Return the device that `auto` is."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def falling(robust: Sequence[np.ndarray]) -> list[Rate]:
    """Return the robust accuracy at each eps, in rising order; an image fooled once is fooled at larger eps."""
    left, rates = np.ones_like(robust[0]), []
    for one in robust:
        left = left & one
        rates.append(Rate.of(int(left.sum()), len(left)))
    return rates


# --- tables


def transfer_table(study: Study) -> None:
    """Transfer between members, diversity and cosines, on the same images for all."""
    names = list(study.trained)
    only = study.common([folder(name) for name in names])
    found = {name: study.compared(folder(name), only) for name in names}
    scale = study.scale
    title(
        f"between members: PGD at {scale.transfer}, {scale.steps} steps, {scale.restarts} restarts; {len(only)} "
        f"of {len(study.samples)} images, those that every member of all has right"
    )
    rows = []
    for name, one in found.items():
        mean = one.between
        # Over six cells of the same images: as wide as for one of them, at least as wide as it is.
        rate = Rate.of(round(mean * len(only)), len(only))
        least = [bounds.any.value for bounds in one.attacked]
        rows.append(
            [
                name,
                f"{100 * mean:.1f} ({100 * rate.low:.1f} – {100 * rate.high:.1f})",
                cell(one.worst[-1]),
                f"{100 * sum(least) / len(least):.1f}",
                f"{one.apartness:.2f}",
                f"{one.alignment:.2f}",
            ]
        )
    show(["", "on another member", "on the ensemble", "any member right", "d", "cosine"], rows)
    if {BASELINE, DVERGE} <= found.keys():
        points = 100 * (found[BASELINE].between - found[DVERGE].between)
        accuracies = [study.trained[name].accuracy for name in (DVERGE, BASELINE)]
        lost = (
            ""
            if accuracies[0] is None or accuracies[1] is None
            else f", clean accuracy by {100 * (accuracies[0]['value'] - accuracies[1]['value']):+.1f}"
        )
        print(f"\nDVERGE changes transfer between members by {-points:+.1f} points{lost}.")


def robustness_table(study: Study) -> None:
    """Black box, white box and ensemble-aware robust accuracy at every eps, never one of them alone."""
    scale = study.scale
    white = f"pgd(steps={scale.steps},step_size=0.2,restarts={scale.restarts})"
    dark = study.black_box()
    columns: dict[str, dict[str, list[Rate]]] = {"black box": {}, "white box": {}, "aware": {}}
    for name in study.trained:
        plain = study.direct(folder(name), white, "pgd")
        aware = study.direct(folder(name), AWARE, AWARE)
        columns["black box"][name] = falling(dark[name])
        columns["white box"][name] = falling(plain)
        columns["aware"][name] = falling([one & other for one, other in zip(plain, aware, strict=True)])
    for place, eps in enumerate(scale.eps):
        title(f"robust accuracy at linf {eps:g}, {len(study.samples)} images; aware: {AWARE} and PGD")
        rows = [[name, *(cell(column[name][place]) for column in columns.values())] for name in study.trained]
        show(["", *columns], rows)


def members_table(study: Study) -> None:
    """DVERGE of several sizes."""
    method, lr = study.scale.methods[DVERGE]
    rows = []
    for count in study.scale.counts:
        same = count == study.scale.members
        name = folder(DVERGE) if same else f"{folder(DVERGE)}-{count}"
        record = study.ensemble(name, method, lr, count, study.seed)
        found = diversity(
            f"{study.out}/{name}/",
            study.samples,
            None,
            study.scale.transfer,
            steps=study.scale.steps,
            restarts=study.scale.restarts,
            device=study.device,
            out=study.out / "diversity" / f"{name}-own",
        )
        rates = falling(study.direct(name, AWARE, AWARE))
        rows.append([str(count), accuracy(record), f"{100 * found.between:.1f}", *map(cell, rates)])
    title(f"DVERGE against its number of members; transfer on each one's own images; robust accuracy by {AWARE}")
    show(["members", "clean", "transfer", *(f"linf {eps:g}" for eps in study.scale.eps)], rows)


# --- printing


def cell(rate: Rate) -> str:
    """Return a share in percent with its interval."""
    return f"{100 * rate.value:.1f} ({100 * rate.low:.1f} – {100 * rate.high:.1f})"


def accuracy(record: Trained) -> str:
    """Return the accuracy of what was trained."""
    return "–" if record.accuracy is None else cell(Rate(**record.accuracy))


def show(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns, numbers to the right."""
    widths = [max(len(row[place]) for row in (head, *rows)) for place in range(len(head))]
    for row in (head, *rows):
        cells = (
            text.rjust(w) if column else text.ljust(w)
            for column, (text, w) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join(cells))


def title(text: str) -> None:
    """Print what the next table is."""
    print(f"\n{text}\n")


def say(text: str) -> None:
    """Tell how far it is."""
    print(text, file=sys.stderr, flush=True)


def about(study: Study) -> None:
    """Print what was trained, how good it is on clean images, and its cost."""
    scale = study.scale
    title(
        f"{study.train}, {scale.limit or 'all'} images; {scale.members} x {scale.arch}, {scale.epochs} epochs each"
    )
    rows = [
        [
            name,
            accuracy(record),
            " ".join(f"{100 * share:.1f}" for share in record.member_accuracy),
            f"{record.cost['flops']:.1e}",
            f"{record.cost['seconds']:.0f}",
        ]
        for name, record in study.trained.items()
    ]
    show(["", "clean accuracy", "members", "training FLOP", "seconds"], rows)
    print()
    for name, (method, lr) in scale.methods.items():
        print(f"{name}: {method}, learning rate {lr:g}")


def main() -> None:
    """Train, attack, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="digits")
    parser.add_argument(
        "--data", type=Path, default=Path("."), help="folder of cifar10_train.npz, cifar10_test.npz"
    )
    parser.add_argument("--out", type=Path, help="folder of all runs [default: runs/dverge-SCALE]")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument(
        "--methods", nargs="+", choices=SCALES["digits"].methods, help="only these, and the baseline"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arch", help="of all nets")
    for name in ("limit", "images", "epochs", "members", "steps", "restarts"):
        parser.add_argument(f"--{name}", type=int)
    given = parser.parse_args()
    changes = {
        name: value
        for name in ("arch", "limit", "images", "epochs", "members", "steps", "restarts")
        if (value := getattr(given, name)) is not None
    }
    scale = replace(SCALES[given.scale], **changes)
    if given.methods:
        # Black-box images are crafted on plain ensembles: there is always a baseline.
        scale = replace(scale, methods={name: scale.methods[name] for name in (BASELINE, *given.methods)})
    study = Study(scale, given.data, given.out or Path("runs") / f"dverge-{given.scale}", given.device, given.seed)
    about(study)
    tables = {"transfer": transfer_table, "robustness": robustness_table, "members": members_table}
    for name in TABLES:
        if name in given.tables and (name != "members" or scale.counts):
            tables[name](study)


if __name__ == "__main__":
    main()
