"""How long a step of DVERGE takes, against a plain, literal implementation of the published algorithm.

    python scripts/benchmarks/bench_dverge.py                        about 3 minutes on one core

Three ResNet-20 on random images of CIFAR's size, ten steps of distillation, in one process and by turns; a step
is all that happens to a batch: distillation, losses, backward passes, optimisers. The literal one is written
below from the description of the algorithm (arXiv:2009.14720): it takes the target's features anew in each step
of the distillation, goes back through the weights' gradients too, which are unused, and stops forward at its
layer. The mean is over the layers as the method draws them, each as likely as another. Seconds are of the
processor on a CPU, since other jobs lengthen those of the clock, and of the clock on a GPU. Losses of the first
steps are printed beside each other: literal, ours in the same memory layout, and in the one that the loop uses,
whose sums round otherwise, so that signs near 0 turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit import load_model
from robustkit.core.rng import RowRng
from robustkit.models import Classifier
from robustkit.registry import make_method
from robustkit.training.loop import take_step
from robustkit.training.method import Batch, Method, Plan
from robustkit.training.nets import Member, net_of

MEMBERS, LAYERS, EPS, STEPS, LR = 3, 20, 0.07, 10, 0.01
SGD: dict[str, Any] = {"lr": LR, "momentum": 0.9, "weight_decay": 1e-4}


# --- the literal one


def literal_features(net: Any, x: Tensor, layer: int) -> Tensor:
    """Return a layer of a ResNet-20 before its activation, going no further."""
    out = net.bn1(net.conv1(x))
    if layer == 1:
        return out
    out, depth = F.relu(out), 1
    for block in [*net.layer1, *net.layer2, *net.layer3]:
        inner = block.bn1(block.conv1(out))
        depth += 1
        if depth == layer:
            return inner
        inner = block.bn2(block.conv2(F.relu(inner)))
        shortcut = out
        if block.stride > 1:
            shortcut = F.pad(out[:, :, ::2, ::2], (0, 0, 0, 0, block.pad, block.pad))
        out = inner + shortcut
        depth += 1
        if depth == layer:
            return out
        out = F.relu(out)
    return net.linear(out.mean((2, 3)))


def literal_distilled(net: nn.Module, source: Tensor, target: Tensor, layer: int) -> Tensor:
    """Return images near the source that a layer takes for the target."""
    x, momentum = source.clone(), torch.zeros_like(source)
    for _ in range(STEPS):
        x = x.detach().requires_grad_()
        loss = F.mse_loss(literal_features(net, x, layer), literal_features(net, target, layer).detach())
        net.zero_grad()
        loss.backward()
        gradient: Any = x.grad
        norm = gradient.abs().flatten(1).sum(1).clamp(min=1e-12)
        momentum = momentum + gradient / norm.view(-1, 1, 1, 1)
        x = x - EPS / STEPS * momentum.sign()
        x = torch.min(torch.max(x, source - EPS), source + EPS)
        x = x.clamp(0, 1)
    return x.detach()


def literal_step(
    nets: Sequence[nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
    images: tuple[Tensor, Tensor, Tensor],
    layer: int,
) -> Tensor:
    """Train on one batch; return the mean loss of the members."""
    source, labels, target = images
    distilled = [literal_distilled(net, source, target, layer) for net in nets]
    total = torch.zeros((), device=source.device)
    for i, (net, optimizer) in enumerate(zip(nets, optimizers, strict=True)):
        loss = sum(F.cross_entropy(net(x), labels) for j, x in enumerate(distilled) if j != i)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach()
    return total / len(nets)


# --- ours


def our_step(
    method: Method,
    nets: Sequence[nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
    batch: Batch,
    plan: Plan,
) -> Tensor:
    """Train on one batch as the loop does; return the mean loss of the members."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss = method.backward(nets, batch, plan)
    for optimizer in optimizers:
        take_step(method, optimizer, batch.step, plan)
    return loss


# --- both


class Rivals:
    """The same nets and images twice, ours in a memory layout of their own."""

    def __init__(self, size: int, device: str, layout: torch.memory_format, seed: int = 0) -> None:
        self.plan = Plan(size, 10, size, 100, LR, MEMBERS)
        self.device = torch.device(device)
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.rand(2, size, 3, 32, 32, generator=generator).to(device)
        self.labels = (torch.arange(size) % 10).to(device)
        self.images = pixels[0], self.labels, pixels[1]
        self.source, self.target = (one.contiguous(memory_format=layout) for one in pixels)
        self.ids = torch.arange(size, device=device)
        nets = [self._net(number) for number in range(MEMBERS)]
        self.plain = [net_of(net) for net in nets]
        self.plain_optimizers = [torch.optim.SGD(net.parameters(), **SGD) for net in self.plain]
        self.ours = [
            Member(self._net(number).to(memory_format=layout).train()).train() for number in range(MEMBERS)
        ]
        method = make_method("dverge", baseline=0.0)
        self.our_optimizers = [method.optimizer(member.net.parameters(), self.plan) for member in self.ours]

    def _net(self, number: int) -> Classifier:
        return load_model("robustkit:cifar-resnet20?pretrained=false", seed=number, device=self.device).train()

    def literal(self, layer: int) -> float:
        """Do a step in the literal way."""
        return float(literal_step(self.plain, self.plain_optimizers, self.images, layer))

    def robustkit(self, layer: int, step: int = 0) -> float:
        """Do a step in ours."""
        method = make_method("dverge", layer=str(layer), baseline=0.0)
        rng = RowRng(0, "method", self.ids, step=step)
        batch = Batch(self.source, self.labels, rng, step, self.target, self.labels)
        return float(our_step(method, self.ours, self.our_optimizers, batch, self.plan))


def seconds(work: Callable[[], float], device: str) -> float:
    """Return how long it takes."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    begun = clock()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - begun


def main() -> None:
    """Compare losses, then time every layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=1, help="of all layers; 0: only losses")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()

    print(f"losses of the first steps, layers drawn as 7, 15, 20; batches of {given.batch_size}\n")
    print(f"{'step':>4}  {'literal':>10}  {'same layout':>11}  {'channels last':>13}")
    same = Rivals(given.batch_size, given.device, torch.contiguous_format)
    rivals = Rivals(given.batch_size, given.device, torch.channels_last)
    for step, layer in enumerate((7, 15, 20)):
        three = same.literal(layer), same.robustkit(layer, step), rivals.robustkit(layer, step)
        print(f"{step + 1:>4}  {three[0]:>10.6f}  {three[1]:>11.6f}  {three[2]:>13.6f}", flush=True)

    if not given.rounds:
        return
    print(f"\nseconds a step, {MEMBERS} x ResNet-20, {STEPS} steps of distillation, fastest of {given.rounds}\n")
    print(f"{'layer':>5}  {'literal':>8}  {'robustkit':>9}  {'times':>5}")
    fastest: list[tuple[float, float]] = []
    for layer in range(1, LAYERS + 1):
        pairs = [
            (
                seconds(partial(rivals.literal, layer), given.device),
                seconds(partial(rivals.robustkit, layer), given.device),
            )
            for _ in range(given.rounds)
        ]
        one, other = (min(pair[place] for pair in pairs) for place in range(2))
        fastest.append((one, other))
        print(f"{layer:>5}  {one:>8.2f}  {other:>9.2f}  {one / other:>5.2f}", flush=True)
    plain, ours = (statistics.fmean(pair[place] for pair in fastest) for place in range(2))
    print(f"{'mean':>5}  {plain:>8.2f}  {ours:>9.2f}  {plain / ours:>5.2f}")


if __name__ == "__main__":
    main()
