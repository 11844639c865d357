"""Train small nets whose recipes had no part in choosing the `rapid` suite.

    python scripts/reproductions/train_holdouts.py --data cifar10_train.npz --net wrn|plain|mlp --out \
        FILE.safetensors

`wrn`: WideResNet-10-2 against linf:4/255; `plain`: five convolutions with GELU and no shortcuts, against l2:0.5;
`mlp`: two hidden layers on digits:train, against linf:0.1.
Adversarial training (Madry et al. 2018, arXiv:1706.06083) with two steps, in bf16 where AMX is. Load them
as `robustkit.models.zoo.wide_resnet:WideResNet@FILE?depth=10&width=2` and
`scripts/reproductions/train_holdouts.py:PlainCNN@FILE` (or `MLP`).
Hardware: 1 CPU core with AMX. Minutes: 12 for `wrn`, 9 for `plain`, with --epochs 5; seconds for `mlp`
with --epochs 60.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from robustkit.core.rng import RowRng
from robustkit.core.threat import ThreatModel
from robustkit.data import load_data
from robustkit.models.zoo.wide_resnet import WideResNet

BATCH = 128
# Elsewhere bf16 convolutions are many times slower than float32 on a CPU.
BF16 = torch.cpu._is_amx_tile_supported()


class PlainCNN(nn.Sequential):
    """Five convolutions with batch norm and GELU, then one linear layer."""

    def __init__(self, num_classes: int = 10) -> None:
        layers: list[nn.Module] = []
        inside = 3
        for outside, stride in ((24, 1), (48, 2), (48, 1), (96, 2), (96, 1)):
            layers += [
                nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(outside),
                nn.GELU(),
            ]
            inside = outside
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, num_classes))


class MLP(nn.Sequential):
    """Two hidden layers of 128 on 8 x 8 images of one channel."""

    def __init__(self, num_classes: int = 10) -> None:
        hidden = [nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh()]
        super().__init__(nn.Flatten(), *hidden, nn.Linear(128, num_classes))


NETS = {
    "wrn": (lambda: WideResNet(depth=10, width=2), "linf:4/255"),
    "plain": (PlainCNN, "l2:0.5"),
    "mlp": (MLP, "linf:0.1"),
}


def attacked(net: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, rng: RowRng, steps: int = 2) -> Tensor:
    """Return the images after projected ascent of the cross-entropy from a random start."""
    found = threat.random_start(x, rng)
    for _ in range(steps):
        found.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=BF16):
            logits = net(found)
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits.float(), y), found)
        found = threat.retract(found.detach() + 0.75 * float(threat.eps) * threat.ascent(gradient), x)
    return found


def main() -> None:
    """Train one net and write its weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--net", choices=NETS, required=True)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    samples = load_data(arguments.data)
    build, text = NETS[arguments.net]
    net, threat = build().to(memory_format=torch.channels_last), ThreatModel.parse(text)
    optimizer = torch.optim.SGD(net.parameters(), momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = len(samples) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=arguments.epochs * steps)
    side, mirrored = samples.images([0]).shape[-1], arguments.net != "mlp"
    most = side // 8
    labels, begun = torch.from_numpy(samples.labels), time.perf_counter()
    for epoch in range(arguments.epochs):
        right = seen = 0
        for rows in torch.randperm(len(samples))[: steps * BATCH].split(BATCH):
            x, y = samples.images(rows.numpy()), labels[rows]
            if mirrored:
                x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)
            across, down = torch.randint(0, 2 * most + 1, (2,)).tolist()
            x = F.pad(x, (most,) * 4)[:, :, down : down + side, across : across + side]
            x = x.contiguous(memory_format=torch.channels_last)
            net.eval()
            x = attacked(net, x, y, threat, RowRng(arguments.seed, f"epoch {epoch}", rows))
            net.train()
            with torch.autocast("cpu", torch.bfloat16, enabled=BF16):
                logits = net(x)
            optimizer.zero_grad()
            F.cross_entropy(logits.float(), y).backward()
            optimizer.step()
            schedule.step()
            right, seen = right + int((logits.argmax(1) == y).sum()), seen + len(y)
        minutes = (time.perf_counter() - begun) / 60
        print(f"epoch {epoch + 1}: {right / seen:.1%} right under attack, {minutes:.1f} minutes", flush=True)
    recipe = {"recipe": f"PGD-2 adversarial training, {threat}, {arguments.epochs} epochs, seed {arguments.seed}"}
    arguments.out.write_bytes(save({k: v.contiguous() for k, v in net.state_dict().items()}, recipe))


if __name__ == "__main__":
    main()
