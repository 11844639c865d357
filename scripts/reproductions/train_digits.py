"""Train the built-in default model, `robustkit:digits-cnn`, and write it into the package.

    python scripts/reproductions/train_digits.py

Adversarial training (Madry et al. 2018, arXiv:1706.06083) on scikit-learn's digits: PGD within linf:0.15,
images shifted by up to one pixel. Hardware: 2 CPU cores. Minutes: 1.3. Expected on `digits:test` (359
images): clean accuracy 98.1 %; after PGD-40 87.5 % within linf:0.1, 72.1 % within 0.15, 37.0 % within 0.2.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save

from robustkit.data import load_data
from robustkit.models.zoo.digits_cnn import DigitsCNN

FILE = Path(__file__).parents[2] / "robustkit" / "weights" / "digits-cnn.safetensors"
SEED, EPOCHS, BATCH, LR, EPS, STEPS = 0, 80, 64, 3e-3, 0.15, 7


def pgd(net: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, eps: float, steps: int) -> torch.Tensor:
    """Return the images moved within linf:eps, in signed steps of 2.5 eps / steps from a random start."""
    adversarial = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
    for _ in range(steps):
        adversarial.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(net(adversarial), y), adversarial)
        moved = adversarial.detach() + 2.5 * eps / steps * gradient.sign()
        adversarial = moved.clamp(x - eps, x + eps).clamp(0, 1)
    return adversarial


def shifted(x: torch.Tensor) -> torch.Tensor:
    """Return each image moved by -1, 0 or 1 pixel along each axis, with black behind it."""
    _, _, height, width = x.shape
    padded = F.pad(x, (1, 1, 1, 1))
    corners = torch.randint(3, (len(x), 2)).tolist()
    return torch.stack(
        [
            image[:, top : top + height, left : left + width]
            for image, (top, left) in zip(padded, corners, strict=True)
        ]
    )


def accuracy(net: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Return the share of images that the net classifies correctly."""
    with torch.no_grad():
        return (net(x).argmax(1) == y).float().mean().item()


def split(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all images and labels of one split of the digits."""
    data = load_data(f"digits:{name}")
    return data.images(range(len(data.labels))), torch.from_numpy(data.labels)


def train(x: torch.Tensor, y: torch.Tensor) -> DigitsCNN:
    """Return the net after all epochs of a one-cycle schedule."""
    net = DigitsCNN()
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=1e-3)
    batches = len(x) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LR, total_steps=EPOCHS * batches)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x))[: batches * BATCH].split(BATCH):
            images = shifted(x[rows])
            loss = F.cross_entropy(net(pgd(net, images, y[rows], EPS, STEPS)), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net


def main() -> None:
    """Train, measure on the test split, and write the weights."""
    start = time.perf_counter()
    torch.manual_seed(SEED)
    net = train(*split("train"))
    minutes = (time.perf_counter() - start) / 60
    x, y = split("test")
    print(f"trained in {minutes:.1f} minutes; clean accuracy {accuracy(net, x, y):.1%} of {len(x)} images")
    for eps in (0.1, 0.15, 0.2):
        print(f"PGD-40 linf:{eps}: {accuracy(net, pgd(net, x, y, eps, 40), y):.1%}")
    metadata = {
        "arch": "robustkit:digits-cnn",
        "source": "scripts/reproductions/train_digits.py on scikit-learn's digits, split digits:train",
        "recipe": f"PGD-{STEPS} adversarial training, linf:{EPS}, {EPOCHS} epochs, AdamW, seed {SEED}",
    }
    FILE.write_bytes(save(net.state_dict(), metadata))
    print(f"wrote {FILE}, {FILE.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
