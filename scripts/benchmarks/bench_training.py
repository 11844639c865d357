"""Training speed: ResNet-20 on CIFAR-10, robustkit's loop against a plain PyTorch loop with torchvision's loader.

    python scripts/benchmarks/bench_training.py --data cifar10_train.npz [--images 5120] [--epochs 3] [--device \
        cpu]

Prints images per second, and per second of processor time with all workers', of three loops over the same images,
batch 128, SGD with momentum, crop and flip: the model alone (one batch that is already there, again and again),
`robustkit train standard`, and a plain loop (PIL
images, RandomCrop, RandomHorizontalFlip, ToTensor, Normalize, a DataLoader with 2 persistent workers). The first
epoch of each is a warm-up; the median of the others counts, and loops take turns. On a machine that does other
things too only processor time is to be believed. Expected: robustkit at no less than 95 % of the model alone.
Minutes: 5 on one CPU core; see scripts/results/.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from robustkit import load_data, train
from robustkit.models.zoo.cifar_resnet import CifarResNet
from robustkit.training.progress import TrainProgress

BATCH = 128
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)


class Pictures(Dataset[Any]):
    """What torchvision's CIFAR10 is: arrays that become PIL images one by one."""

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        self.x, self.y = x, y
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, at: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.x[at])), int(self.y[at])


def stepper(device: torch.device, layout: torch.memory_format) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Return one plain training step of a new ResNet-20."""
    net = CifarResNet(depth=20).to(device).to(memory_format=layout).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(net(x), y).backward()
        optimizer.step()

    return step


@dataclass(frozen=True)
class Moment:
    """A time on the wall, and seconds that this process and its workers had of the processor."""

    wall: float
    processor: float

    @classmethod
    def now(cls, device: torch.device, workers: Sequence[int] = ()) -> Moment:
        """Return the time when the device has finished its work."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ticks = sum(sum(map(int, Path(f"/proc/{pid}/stat").read_text().split()[13:15])) for pid in workers)
        return cls(time.perf_counter(), time.process_time() + ticks / os.sysconf("SC_CLK_TCK"))

    def speeds(self, before: Moment, images: int) -> tuple[float, float]:
        """Return images per second of either kind since another moment."""
        return images / (self.wall - before.wall), images / (self.processor - before.processor)


Speeds = list[tuple[float, float]]


def model_alone(device: torch.device, steps: int, epochs: int) -> Speeds:
    """Return the speeds of each epoch over one batch that never changes."""
    step = stepper(device, torch.channels_last)
    x = torch.rand(BATCH, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (BATCH,), device=device)
    found = []
    for _ in range(epochs):
        begun = Moment.now(device)
        for _ in range(steps):
            step(x, y)
        found.append(Moment.now(device).speeds(begun, steps * BATCH))
    return found[1:]


def plain_loop(device: torch.device, x: np.ndarray, y: np.ndarray, epochs: int) -> Speeds:
    """Return the speeds of each epoch of the usual loop."""
    step = stepper(device, torch.contiguous_format)
    loader = DataLoader(
        Pictures(x, y),
        BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=2,
        persistent_workers=True,
        pin_memory=device.type == "cuda",
    )
    moments = []
    for _ in range(epochs):
        for images, labels in loader:
            step(images.to(device, non_blocking=True), labels.to(device, non_blocking=True))
        workers = [child.pid for child in multiprocessing.active_children() if child.pid]
        moments.append(Moment.now(device, workers))
    return [after.speeds(before, len(loader) * BATCH) for before, after in pairwise(moments)]


class Clock(TrainProgress):
    """Notes the moment of each epoch's last step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.moments: list[Moment] = []

    def begin(self, epochs: int, steps: int, images: int) -> None:
        """Take the size of an epoch."""
        self.steps = steps

    def step(self, done: int) -> None:
        """Note a moment between epochs."""
        if done % self.steps == 0:
            self.moments.append(Moment.now(self.device))


def robustkit_loop(device: torch.device, data: str, count: int, epochs: int) -> Speeds:
    """Return the speeds of each epoch of `robustkit train standard`, checkpoints and all."""
    clock = Clock(device)
    with tempfile.TemporaryDirectory() as folder:
        train(
            "standard",
            data,
            arch="robustkit:cifar-resnet20",
            limit=count,
            epochs=epochs,
            batch_size=BATCH,
            precision="fp32",
            device=device,
            out=Path(folder) / "run",
            progress=clock,
        )
    images = count // BATCH * BATCH
    return [after.speeds(before, images) for before, after in pairwise(clock.moments)]


def main() -> None:
    """Run all three, in turns, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", type=int, default=5120)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    samples = load_data(arguments.data).head(arguments.images)
    x = (samples.images(range(len(samples))).permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    loops = {
        "model alone": lambda: model_alone(device, len(x) // BATCH, arguments.epochs),
        "robustkit train": lambda: robustkit_loop(device, arguments.data, len(x), arguments.epochs),
        "plain loop, 2 workers": lambda: plain_loop(device, x, samples.labels, arguments.epochs),
    }
    found: dict[str, Speeds] = {name: [] for name in loops}
    for _ in range(arguments.rounds):
        for name, loop in loops.items():
            found[name] += loop()
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU thread(s)"
    )
    print(f"ResNet-20, {len(x)} images, batch {BATCH}, float32, {name}, torch {torch.__version__}")
    middle = {
        loop: [statistics.median(kind) for kind in zip(*speeds, strict=True)] for loop, speeds in found.items()
    }
    for label, (wall, processor) in middle.items():
        share = f"{processor / middle['model alone'][1]:.1%} of the model alone"
        print(f"{label:<24}{wall:>8,.0f} images/s{processor:>8,.0f} per processor second   {share}")


if __name__ == "__main__":
    main()
