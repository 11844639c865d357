"""CPU time of `craft` over that of the bare forward and backward passes, with the rest in a start-up figure.

    python scripts/benchmarks/bench_craft_overhead.py --nets FOLDER --data cifar10_test.npz [--surrogate resnet20]
        [--second resnet32] [--images 24 512] [--attack A ...] [--torchattacks FOLDER]

Each row runs in one process `craft` with one target, and a plain loop of as many gradients. The loop runs the
nets as `craft` does (batch, folded batch norms, memory layout), computes the gradient of the cross-entropy, and
moves the images by its sign. Seconds are of the processor: "crafting" from the first batch to the last one,
"bare" of the plain loop, and "rest" of all else in `craft`: loading, the choice of how to run the nets,
evaluation of surrogates and target, checks and files. With `--torchattacks`, a folder from which that package
is imported, MI-FGSM of 20 steps is run on 24 images in processes of their own, with robustkit and with
torchattacks. All their seconds count, those of imports too. Both evaluate the surrogate and one target on clean
and perturbed images.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from robustkit import craft, load_data, load_model
from robustkit.engine.model.batchnorm_folding import folded
from robustkit.engine.progress import Progress

EPS = 8 / 255
# Attacks, each with its number of surrogates.
ATTACKS = (("mi-fgsm", 1), ("mi-fgsm(steps=2)+vmi(copies=4)", 1), ("mi-fgsm(steps=5)", 2), ("cwa(steps=3)", 2))


class StageClock(Progress):
    """Notes the processor seconds at which the first stage, the crafting, begins and its last batch is done."""

    def __init__(self) -> None:
        self.begun = self.ended = 0.0
        self.stages = 0

    def stage(self, name: str, images: int, robust: int, n: int) -> None:
        """Note the begin of the first stage."""
        self.stages += 1
        if self.stages == 1:
            self.begun = time.process_time()

    def advance(self, done: float, robust: int) -> None:
        """Note the end of each batch of the first stage."""
        if self.stages == 1:
            self.ended = time.process_time()


def craft_once(surrogates: list[str], target: str, attack: str, x: Tensor, y: Any) -> tuple[float, float, Any]:
    """Return the processor seconds of crafting and of the rest, and the record."""
    clock, begun = StageClock(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        record = craft(
            surrogates, x, y, attack=attack, threat="linf:8/255", targets=[target], device="cpu",
            out=Path(folder) / "run", progress=clock,
        )  # fmt: skip
    crafting = clock.ended - clock.begun
    return crafting, time.process_time() - begun - crafting, record


def bare_passes(surrogates: list[str], record: Any, x: Tensor, y: Tensor) -> float:
    """Return the processor seconds of a plain loop with as many gradients of each net, run in the same way."""
    ways = record.environment["ways"]["members"]
    nets = []
    for string, way in zip(surrogates, ways, strict=True):
        net = load_model(string).eval().requires_grad_(False)
        net = (folded(net, x[:1]) if way["folded"] else None) or net
        nets.append((net, torch.channels_last if way["channels_last"] else torch.contiguous_format))
    steps = round(record.gradients_per_image / len(nets))
    begun = time.process_time()
    size = record.environment["images_at_once"]
    for batch, labels in zip(x.split(size), y.split(size), strict=True):
        point = batch
        for _ in range(steps):
            for net, layout in nets:
                point = point.detach().requires_grad_()
                loss = F.cross_entropy(net(point, layout), labels)
                (gradient,) = torch.autograd.grad(loss, point)
                point = point.detach() + EPS / steps * gradient.sign()
    return time.process_time() - begun


# A program each, run by `whole_process` with the nets, the data and the number of images; both take 20 steps.
WITH_ROBUSTKIT = """
import sys
from robustkit import craft, load_data
surrogate, target, data, count = sys.argv[1:5]
samples = load_data(data).head(int(count))
x = samples.images(range(len(samples)))
record = craft(
    [surrogate], x, samples.labels, attack="mi-fgsm(steps=20)", threat="linf:8/255", targets=[target], device="cpu"
)
print(record.gradients_per_image)
"""
WITH_TORCHATTACKS = """
import sys
import torch, torchattacks
from robustkit import load_data, load_model
surrogate, target, data, count = sys.argv[1:5]
samples = load_data(data).head(int(count))
x, y = samples.images(range(len(samples))), torch.from_numpy(samples.labels).long()
nets = [load_model(string).eval() for string in (surrogate, target)]
x_adv = torchattacks.MIFGSM(nets[0], eps=8 / 255, alpha=2 / 255, steps=20, decay=1.0)(x, y)
with torch.no_grad():
    print([[float((net(images).argmax(1) == y).float().mean()) for images in (x, x_adv)] for net in nets])
"""
PROGRAMS = (WITH_ROBUSTKIT, WITH_TORCHATTACKS)


def whole_process(program: str, arguments: list[str], folder: str) -> float:
    """Return the processor seconds of a process that runs a program."""
    before = os.times()
    paths = os.pathsep.join(part for part in (os.environ.get("PYTHONPATH"), folder) if part)
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": paths},
    )
    now = os.times()
    return now.children_user + now.children_system - before.children_user - before.children_system


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--surrogate", default="resnet20")
    parser.add_argument("--second", default="resnet32")
    parser.add_argument("--target", default="resnet44")
    parser.add_argument("--images", type=int, nargs="+", default=[24, 512])
    parser.add_argument("--attack", nargs="+", help="only these attacks")
    parser.add_argument("--torchattacks", help="a folder with this package")
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()

    def string(name: str) -> str:
        return f"robustkit:cifar-{name}@{given.nets / name}.safetensors"

    target = string(given.target)
    print(f"surrogate {given.surrogate}, {torch.get_num_threads()} CPU thread(s), torch {torch.__version__}")
    if given.torchattacks:
        arguments = [string(given.surrogate), target, given.data, "24"]
        pairs = [
            [
                whole_process(program, arguments, given.torchattacks)
                for program in (WITH_ROBUSTKIT, WITH_TORCHATTACKS)
            ]
            for _ in range(given.rounds)
        ]
        ours, theirs = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
        print(f"24 images, 20 steps, whole processes: robustkit {ours:.1f} s, torchattacks {theirs:.1f} s")
    print(
        f"\n{'attack':<32}{'nets':>5}{'images':>8}{'gradients':>11}{'crafting':>10}{'bare':>8}{'ratio':>7}{'rest':>7}"
    )
    for count in given.images:
        samples = load_data(given.data).head(count)
        x, y = samples.images(range(count)), torch.from_numpy(samples.labels).long()
        for attack, members in ATTACKS:
            if given.attack and attack not in given.attack:
                continue
            nets = [string(name) for name in (given.surrogate, given.second)[:members]]
            crafting, rest, record = craft_once(nets, target, attack, x, samples.labels)
            bare = bare_passes(nets, record, x, y)
            print(
                f"{attack:<32}{members:>5}{count:>8}{record.gradients_per_image:>11.0f}{crafting:>10.2f}{bare:>8.2f}"
                f"{crafting / bare:>7.2f}{rest:>7.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
