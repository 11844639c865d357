"""Train the strictness zoo: nets of many kinds on which suites of attacks are compared with AutoAttack.

    python scripts/reproductions/train_zoo.py --mnist mnist.npz --cifar-train cifar10_train.npz \
        --cifar-test cifar10_test.npz --out zoo [--only REGEX] [--list]

Each net is a run folder of `robustkit train`: `zoo/NAME/`, itself a model string. The first 2,000 MNIST images and
the CIFAR-10 test set are for testing; the next 4,000 MNIST images and the first 3,000 CIFAR-10 training images are
for training. The same command goes on where it was stopped. The weights are not kept with the project.

Half of the zoo is held out: the nets of each data set are ordered by the SHA-256 of their names, and every second
one, from the first on, must not be evaluated while a suite is composed. `--list` prints both halves.

Hardware: 2 CPU cores; two hours for all.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import time
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from robustkit import train
from robustkit.data import load_data
from robustkit.data.samples import Samples

NETS = Path(__file__).with_name("zoo_nets.py")
MNIST_TEST, MNIST_TRAIN, CIFAR_TRAIN = 2000, 4000, 3000


@dataclass(frozen=True)
class Entry:
    """One net of the zoo.

    Attributes:
        name: of its folder; begins with the data's: `mnist`, `cifar` or `digits`.
        arch: a model string, or what follows `zoo_nets.py:`.
        method: a method string of `robustkit train`.
        threat: what it is evaluated against.
        epochs: passes over the training images.
        lr: the largest learning rate; None is the method's.
        collapsed: whether its training is meant to end robust to single steps only.
    """

    name: str
    arch: str
    method: str
    threat: str
    epochs: int
    lr: float | None = None
    collapsed: bool = False

    @property
    def data(self) -> str:
        """Name of its data."""
        return self.name.partition("-")[0]


MNIST_VIT = "small_vit?side=28&patch=7"
CIFAR_VIT = "small_vit?side=32&patch=4&in_channels=3"
CIFAR_CNN = "small_cnn?in_channels=3&width=24"
CIFAR_NORM = "small_cnn?in_channels=3&width=24&norm=true"
CIFAR_GELU = "gelu_cnn?in_channels=3"
RESNET, WRN = "robustkit:cifar-resnet20", "robustkit:wrn-10-2"
MNIST_CNN = "small_cnn?width=24&pool=mean"
FGSM = "random_start=false,step_size=1.0"

ZOO = [
    # MNIST
    Entry("mnist-plain-cnn", "robustkit:mnist-cnn", "standard", "linf:0.1", 5),
    Entry("mnist-plain-vit", MNIST_VIT, "standard", "l2:1.5", 12, 0.03),
    Entry("mnist-pgd-cnn", MNIST_CNN, "pgd-at(threat=linf:0.2,steps=7)", "linf:0.2", 12, 0.02),
    Entry(
        "mnist-trades-cnn",
        MNIST_CNN,
        "trades(threat=linf:0.3,beta=1.0,steps=10,step_size=0.1)",
        "linf:0.3",
        10,
        0.02,
    ),
    Entry("mnist-pgd-bn", "small_cnn?norm=true", "pgd-at(threat=linf:0.2,steps=7)", "linf:0.2", 10, 0.05),
    Entry("mnist-pgd-mlp", "mlp", "pgd-at(threat=linf:0.1,steps=7)", "linf:0.1", 15, 0.05),
    Entry("mnist-fgsm-cnn", MNIST_CNN, f"fgsm-at(threat=linf:0.3,{FGSM})", "linf:0.3", 15, 0.02, collapsed=True),
    Entry(
        "mnist-fgsm-bn",
        "small_cnn?norm=true",
        f"fgsm-at(threat=linf:0.3,{FGSM})",
        "linf:0.3",
        15,
        0.05,
        collapsed=True,
    ),
    Entry("mnist-fast-cnn", "small_cnn", "fgsm-at(threat=linf:0.2)", "linf:0.2", 12, 0.02),
    Entry("mnist-free-vit", MNIST_VIT, "free-at(threat=linf:0.1,repeats=4)", "linf:0.1", 6, 0.02),
    Entry("mnist-mart-cnn", "small_cnn", "mart(threat=linf:0.2,steps=7)", "linf:0.2", 10, 0.02),
    Entry("mnist-gradreg-cnn", "small_cnn", "grad-reg(weight=30.0)", "l2:1.5", 10, 0.02),
    Entry("mnist-ibp-cnn", "small_cnn", "ibp(threat=linf:0.2)", "linf:0.2", 25),
    Entry("mnist-ibp-mlp", "mlp", "ibp(threat=linf:0.1)", "linf:0.1", 25),
    Entry("mnist-pgd-l2", MNIST_CNN, "pgd-at(threat=l2:1.5,steps=7)", "l2:1.5", 8, 0.02),
    Entry("mnist-trades-gelu", "gelu_cnn", "trades(threat=linf:0.2,beta=3.0,steps=7)", "linf:0.2", 8, 0.02),
    # CIFAR-10
    Entry("cifar-plain-resnet", RESNET, "standard", "linf:2/255", 15),
    Entry("cifar-plain-vit", CIFAR_VIT, "standard", "linf:2/255", 15, 0.03),
    Entry("cifar-pgd-resnet", RESNET, "pgd-at(threat=linf:8/255,steps=3,step_size=0.5)", "linf:8/255", 9, 0.1),
    Entry("cifar-trades-wrn", WRN, "trades(threat=linf:8/255,steps=3,step_size=0.5)", "linf:8/255", 6, 0.1),
    Entry("cifar-fast-resnet", RESNET, "fgsm-at(threat=linf:8/255)", "linf:8/255", 10, 0.1),
    Entry(
        "cifar-fgsm-resnet", RESNET, f"fgsm-at(threat=linf:12/255,{FGSM})", "linf:8/255", 16, 0.2, collapsed=True
    ),
    Entry(
        "cifar-fgsm-bn", CIFAR_NORM, f"fgsm-at(threat=linf:16/255,{FGSM})", "linf:8/255", 30, 0.1, collapsed=True
    ),
    Entry("cifar-fgsm-wrn", WRN, f"fgsm-at(threat=linf:16/255,{FGSM})", "linf:4/255", 12, 0.2, collapsed=True),
    Entry("cifar-free-wrn", WRN, "free-at(threat=linf:4/255,repeats=4)", "linf:4/255", 5, 0.1),
    Entry("cifar-mart-cnn", CIFAR_CNN, "mart(threat=linf:4/255,steps=4)", "linf:4/255", 15, 0.03),
    Entry("cifar-gradreg-gelu", CIFAR_GELU, "grad-reg(weight=30.0)", "linf:2/255", 15, 0.03),
    Entry("cifar-pgd-vit", CIFAR_VIT, "pgd-at(threat=linf:2/255,steps=3,step_size=0.5)", "linf:2/255", 15, 0.03),
    Entry("cifar-pgd-l2", CIFAR_NORM, "pgd-at(threat=l2:0.5,steps=3,step_size=0.5)", "l2:0.5", 12, 0.1),
    Entry("cifar-pgd-l1", CIFAR_NORM, "pgd-at(threat=l1:12,steps=5,step_size=0.3)", "l1:12", 15, 0.1),
    Entry("cifar-ibp-cnn", CIFAR_CNN, "ibp(threat=linf:2/255)", "linf:2/255", 30),
    Entry(
        "cifar-trades-gelu", CIFAR_GELU, "trades(threat=linf:4/255,steps=3,step_size=0.5)", "linf:4/255", 10, 0.03
    ),
    # digits
    Entry("digits-plain-mlp", "mlp?inputs=64", "standard", "linf:0.1", 30),
    Entry("digits-pgd-cnn", "robustkit:digits-cnn", "pgd-at(threat=linf:0.15)", "linf:0.15", 60, 0.1),
    Entry(
        "digits-fgsm-bn",
        "small_cnn?norm=true",
        f"fgsm-at(threat=linf:0.3,{FGSM})",
        "linf:0.3",
        150,
        0.1,
        collapsed=True,
    ),
    Entry("digits-trades-l2", "mlp?inputs=64", "trades(threat=l2:1,beta=3.0)", "l2:1", 60, 0.05),
    Entry("digits-mart-gelu", "gelu_cnn", "mart(threat=linf:0.1,steps=7)", "linf:0.1", 40, 0.02),
]


def held_out() -> set[str]:
    """Return the names of the half that has no part in composing suites."""
    ordered = sorted(ZOO, key=lambda entry: (entry.data, hashlib.sha256(entry.name.encode()).hexdigest()))
    return {entry.name for _, group in groupby(ordered, lambda entry: entry.data) for entry in list(group)[::2]}


def _sets(arguments: argparse.Namespace) -> dict[str, tuple[Samples, Samples]]:
    """Return the training and the test images of each set that is given."""
    sets = {"digits": (load_data("digits:train"), load_data("digits:test"))}
    if arguments.mnist:
        mnist = load_data(str(arguments.mnist))
        sets["mnist"] = mnist.pick(np.arange(MNIST_TEST, MNIST_TEST + MNIST_TRAIN)), mnist.head(MNIST_TEST)
    if arguments.cifar_train and arguments.cifar_test:
        sets["cifar"] = (
            load_data(str(arguments.cifar_train)).head(CIFAR_TRAIN),
            load_data(str(arguments.cifar_test)),
        )
    return sets


def main() -> None:
    """Train what is missing, and print a line for each net."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", type=Path)
    parser.add_argument("--cifar-train", type=Path)
    parser.add_argument("--cifar-test", type=Path)
    parser.add_argument("--out", type=Path, default=Path("zoo"))
    parser.add_argument("--only", default="", help="a regular expression that names must match")
    parser.add_argument("--list", action="store_true", help="print the names and which half they are in")
    arguments = parser.parse_args()
    apart = held_out()
    if arguments.list:
        for entry in ZOO:
            print(f"{'held out' if entry.name in apart else 'open':9} {entry.name}")
        return
    sets = _sets(arguments)
    for entry in ZOO:
        if not re.search(arguments.only, entry.name) or entry.data not in sets:
            continue
        images, test = sets[entry.data]
        begun = time.perf_counter()
        arch = entry.arch if entry.arch.startswith("robustkit:") else f"{NETS}:{entry.arch}"
        record = train(
            entry.method,
            images,
            test=test.head(min(1000, len(test))),
            arch=arch,
            epochs=entry.epochs,
            lr=entry.lr,
            out=arguments.out / entry.name,
        )
        accuracy = float("nan") if record.accuracy is None else record.accuracy["value"]
        minutes = (time.perf_counter() - begun) / 60
        print(f"{entry.name:20} clean {accuracy:6.1%}   {minutes:4.1f} minutes", flush=True)


if __name__ == "__main__":
    main()
