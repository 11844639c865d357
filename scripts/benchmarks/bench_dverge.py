"""CPU time of a step of `dverge`, of a literal loop, and of the passes that no implementation can do without.

    python scripts/benchmarks/bench_dverge.py --data cifar10_test.npz [--batch 32] [--layers 2 6 ...] [--rounds 2]

Three ResNet-20 in train mode, one batch, ten distillation steps. Processor seconds, in turn:
- unavoidable: the target's features once, ten forward and backward passes up to the layer, then a training pass of
  each member on the others' images; nothing else, in the memory layout that training uses.
- robustkit: `backward` of the method.
- literal: the features of source and target in each step by full forward passes, in the default memory layout.
- literal, cut: the same, but both forward passes end at the layer.
Also: whether robustkit and the plain loop make the same images, bit by bit, and the time of the three nets' passes
as one net (torch.vmap) over that of one net after the other.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from robustkit import load_data, load_model
from robustkit.core.rng import RowRng
from robustkit.models.zoo.cifar_resnet import CifarResNet
from robustkit.registry import make_method
from robustkit.training.method import Batch, Plan
from robustkit.training.nets import Member, in_channels_last, net_of

MEMBERS, STEPS, EPS, STEP_SIZE = 3, 10, 0.07, 0.007
PLAN = Plan(samples=128, classes=10, batch_size=64, epochs=40, lr=0.1, members=MEMBERS)


def layer_features(net: CifarResNet, x: Tensor) -> Iterator[Tensor]:
    """Yield the features of layers 1 to 20 of a ResNet-20, each when it is reached."""
    out = net.bn1(net.conv1(x))
    yield out
    blocks: list[Any] = [*net.layer1, *net.layer2, *net.layer3]
    for block in blocks:
        out = F.relu(out)
        inner = block.bn1(block.conv1(out))
        yield inner
        shortcut, stride = out, block.stride
        if stride > 1 or block.pad:
            shortcut = F.pad(out[:, :, ::stride, ::stride], (0, 0, 0, 0, block.pad, block.pad))
        out = block.bn2(block.conv2(F.relu(inner))) + shortcut
        yield out
    yield net.linear(F.relu(out).mean((2, 3)))


def features_at(net: CifarResNet, x: Tensor, layer: int, cut: bool) -> Tensor:
    """Return the features of a layer by a pass that ends there, or by a full one."""
    return (
        next(islice(layer_features(net, x), layer - 1, None)) if cut else list(layer_features(net, x))[layer - 1]
    )


def distilled(net: CifarResNet, x: Tensor, target: Tensor, layer: int, *, cut: bool, once: bool) -> Tensor:
    """Return distilled images; `once` computes the target's features once, else in each step."""
    point, velocity, wanted = x, torch.zeros_like(x), None
    low, high = (x - EPS).clamp(0, 1), (x + EPS).clamp(0, 1)
    for _ in range(STEPS):
        if wanted is None or not once:
            with torch.no_grad():
                wanted = features_at(net, target, layer, cut)
        point = point.detach().requires_grad_()
        found = features_at(net, point, layer, cut)
        (gradient,) = torch.autograd.grad(found, point, found.detach() - wanted)
        size = gradient.abs().flatten(1).sum(1).clamp(min=1e-12).view(-1, 1, 1, 1)
        velocity = velocity + gradient / size
        point = torch.clamp(point.detach() - STEP_SIZE * velocity.sign(), low, high)
    return point.detach()


def training_passes(nets: list[Any], images: list[Tensor], y: Tensor) -> None:
    """Add each member's gradients on the others' images."""
    for number, net in enumerate(nets):
        others = [x for other, x in enumerate(images) if other != number]
        sum(F.cross_entropy(net(x), y) for x in others).backward()


def plain_step(nets: list[Any], x: Tensor, y: Tensor, target: Tensor, layer: int, *, cut: bool, once: bool) -> Any:
    """Return the distilled images of a step of plain code, after its training passes."""
    images = [distilled(net, x, target, layer, cut=cut, once=once) for net in nets]
    training_passes(nets, images, y)
    return images


def seconds_of(work: Callable[[], Any]) -> float:
    """Return the processor seconds of some work."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def stacked_ratio(nets: list[Any], x: Tensor, rounds: int) -> float:
    """Return the time of forward and backward passes of all nets stacked, over that of one after the other."""
    parameters, buffers = torch.func.stack_module_state(nets)
    # The running statistics of stacked nets are not updated: a pass without that is no slower.
    base = deepcopy(nets[0]).to("meta")

    def one(own: Any, buffer: Any, images: Tensor) -> Any:
        return torch.func.functional_call(base, (own, buffer), (images,))

    def stacked() -> None:
        points = torch.stack([x] * MEMBERS).requires_grad_()
        logits = torch.vmap(one)(parameters, buffers, points)
        torch.autograd.grad(logits.sum(), points)

    def in_turn() -> None:
        for net in nets:
            point = x.detach().requires_grad_()
            torch.autograd.grad(net(point).sum(), point)

    stacked()
    in_turn()
    pairs = [(seconds_of(stacked), seconds_of(in_turn)) for _ in range(rounds)]
    return sum(first for first, _ in pairs) / sum(second for _, second in pairs)


def main() -> None:
    """Print a row for each layer, and their sum."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 6, 10, 15, 20])
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    samples = load_data(given.data).head(2 * given.batch)
    both, labels = samples.images(range(2 * given.batch)), torch.from_numpy(samples.labels).long()
    x, target, y = both[: given.batch], both[given.batch :], labels[: given.batch]
    members: list[Member] = []
    plain: list[Any] = []
    fast: list[Any] = []
    for seed in range(MEMBERS):
        classifier = load_model("robustkit:cifar-resnet20?pretrained=false", seed=seed).train().requires_grad_()
        plain.append(deepcopy(net_of(classifier)))
        members.append(Member(in_channels_last(classifier, x[:2]), seed=seed).train())
        fast.append(deepcopy(members[-1].net))
    x_fast, target_fast = (images.contiguous(memory_format=torch.channels_last) for images in (x, target))
    rng = RowRng(0, "method", torch.arange(given.batch))
    batch = Batch(x, y, rng, PLAN.steps - 1, target, labels[given.batch :])
    print(f"3 ResNet-20, batch {given.batch}, {torch.get_num_threads()} CPU thread(s), torch {torch.__version__}")
    print(f"stacked by torch.vmap: {stacked_ratio(plain, x[:32], given.rounds):.2f} of the time in turn\n")
    names = ("unavoidable", "robustkit", "literal", "literal, cut")
    print(f"{'layer':<7}" + "".join(f"{name:>14}" for name in names) + "   over unavoidable   of literal's speed")
    total = dict.fromkeys(names, 0.0)
    for layer in given.layers:
        method = make_method("dverge", layer=str(layer))
        loops = (
            lambda: plain_step(fast, x_fast, y, target_fast, layer, cut=True, once=True),  # noqa: B023
            lambda: method.backward(members, batch, PLAN),  # noqa: B023
            lambda: plain_step(plain, x, y, target, layer, cut=False, once=False),  # noqa: B023
            lambda: plain_step(plain, x, y, target, layer, cut=True, once=False),  # noqa: B023
        )
        if layer == given.layers[0]:
            # The first passes of a process take longer than others.
            for loop in loops:
                loop()
        row = dict.fromkeys(names, 0.0)
        for _ in range(given.rounds):
            for name, loop in zip(names, loops, strict=True):
                row[name] += seconds_of(loop)
        same = all(
            torch.equal(made, distilled(net, x_fast, target_fast, layer, cut=True, once=True))
            for made, net in zip(method.distilled(members, batch, PLAN), fast, strict=True)
        )
        print_row(str(layer), row, "   same images" if same else "   other images")
        total = {name: total[name] + row[name] for name in names}
    print_row("all", total, "")


def print_row(label: str, row: dict[str, float], suffix: str) -> None:
    """Print the seconds of one layer and their ratios."""
    bare, ours, literal, cut = row.values()
    print(
        f"{label:<7}" + "".join(f"{seconds:>14.2f}" for seconds in row.values()),
        f"{ours / bare:>16.2f}{literal / ours:>14.2f} / {cut / ours:.2f}{suffix}",
        flush=True,
    )


if __name__ == "__main__":
    main()
