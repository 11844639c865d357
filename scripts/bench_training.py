"""Training speed: ResNet-20 on CIFAR-10, robustkit's loop against a plain PyTorch loop with torchvision's loader.

    python scripts/bench_training.py --data cifar10_train.npz [--images 5120] [--epochs 3] [--device cpu]

Prints images per second of three loops over the same images, batch 128, SGD with momentum, crop and flip: the
model alone (one batch that is already there, again and again), `robustkit train standard`, and a plain loop (PIL
images, RandomCrop, RandomHorizontalFlip, ToTensor, Normalize, a DataLoader with 2 persistent workers). The first
epoch of each is a warm-up; the median of the others counts, and loops take turns. Expected: robustkit at no less
than 95 % of the model alone. Minutes: 3 on one CPU core.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from robustkit import load_data, train
from robustkit.models.zoo.cifar_resnet import CifarResNet

BATCH = 128
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)


class Pictures(Dataset):
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


def finished(device: torch.device) -> float:
    """Return the time once the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def model_alone(device: torch.device, steps: int, epochs: int) -> list[float]:
    """Return images per second of each epoch over one batch that never changes."""
    step = stepper(device, torch.channels_last)
    x = torch.rand(BATCH, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (BATCH,), device=device)
    speeds = []
    for _ in range(epochs):
        begun = finished(device)
        for _ in range(steps):
            step(x, y)
        speeds.append(steps * BATCH / (finished(device) - begun))
    return speeds


def plain_loop(device: torch.device, x: np.ndarray, y: np.ndarray, epochs: int) -> list[float]:
    """Return images per second of each epoch of the usual loop."""
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
    speeds = []
    for _ in range(epochs):
        begun = finished(device)
        for images, labels in loader:
            step(images.to(device, non_blocking=True), labels.to(device, non_blocking=True))
        speeds.append(len(loader) * BATCH / (finished(device) - begun))
    return speeds


def robustkit_loop(device: torch.device, data: str, count: int, epochs: int) -> list[float]:
    """Return images per second of each epoch of `robustkit train standard`."""
    with tempfile.TemporaryDirectory() as folder:
        record = train(
            "standard",
            data,
            arch="robustkit:cifar-resnet20",
            limit=count,
            epochs=epochs,
            batch_size=BATCH,
            precision="fp32",
            device=device,
            out=Path(folder) / "run",
        )
    return [facts["images_per_second"] for facts in record.history]


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
    found: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(arguments.rounds):
        for name, loop in loops.items():
            found[name] += loop()[1:]
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU thread(s)"
    )
    print(f"ResNet-20, {len(x)} images, batch {BATCH}, float32, {name}, torch {torch.__version__}")
    for loop, speeds in found.items():
        ratio = statistics.median(speeds) / statistics.median(found["model alone"])
        print(f"{loop:<24}{statistics.median(speeds):>9,.0f} images/s   {ratio:>6.1%} of the model alone")


if __name__ == "__main__":
    main()
