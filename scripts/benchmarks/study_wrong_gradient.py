"""Measure how often `wrong-gradient` is raised on nets with a correct gradient, and on nets with a wrong one.

    python scripts/benchmarks/study_wrong_gradient.py --data ../shared/data/mnist_t10k.npz --cifar cifar10_test.npz

Trains or initialises ordinary small nets (ReLU, GELU, LeakyReLU, hardswish, SiLU, tanh; max or average pooling or
strides; with and without batch norm; plain, adversarially trained and random weights; logits multiplied by 1e-4
to 1e4; float32, float64, bfloat16 and float16) on digits, MNIST and CIFAR-10, and looks at each with 32 images and
with 4 single images. Nets of odd numbers were kept aside while the check was designed. Then each fault is put in
front of, or into, the trained float32 nets. About 8 minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.checks.gradients import disagrees
from robustkit.checks.probe import Probe
from robustkit.core.isolation import own_randomness
from robustkit.core.threat import ThreatModel
from robustkit.data import load_data
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.models import as_classifier

ACTIVATIONS = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "leaky": nn.LeakyReLU,
    "hardswish": nn.Hardswish,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}
POOLS = ("max", "avg", "stride")
WEIGHTS = ("plain", "adversarial", "random")
SCALES = (1, 1, 1, 1e4, 1e-4)
TYPES = (torch.float32, torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
SINGLES = 4


class Net(nn.Module):
    """Two or three convolutions and a linear layer; `scale` multiplies the logits."""

    def __init__(self, channels: int, activation: str, pool: str, norm: bool, depth: int, scale: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inside = channels
        for level in range(depth):
            outside = 12 * (level + 1)
            layers.append(nn.Conv2d(inside, outside, 3, 2 if pool == "stride" else 1, padding=1))
            layers += [nn.BatchNorm2d(outside)] if norm else []
            layers.append(ACTIVATIONS[activation]())
            layers += [nn.MaxPool2d(2)] if pool == "max" else [nn.AvgPool2d(2)] if pool == "avg" else []
            inside = outside
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(10))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.scale * self.body(x.to(next(self.parameters()).dtype))


def fit(net: nn.Module, x: Tensor, y: Tensor, adversarial: bool, steps: int = 80) -> None:
    """Train a net for some steps, optionally on images a signed step away from the clean ones."""
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    eps = 0.1 if x.shape[1] == 1 else 8 / 255
    for step in range(steps):
        rows = torch.arange(64 * step, 64 * (step + 1)) % len(x)
        images = x[rows]
        if adversarial:
            points = images.clone().requires_grad_()
            slope = torch.autograd.grad(F.cross_entropy(net(points), y[rows]), points)[0]
            images = (images + eps * slope.sign()).clamp(0, 1)
        loss = F.cross_entropy(net(images) / getattr(net, "scale", 1), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


class Custom(torch.autograd.Function):
    """A function with a backward pass of its own."""

    @staticmethod
    def forward(ctx, x, ahead, back):  # noqa: D102
        ctx.back = back
        return ahead(x)

    @staticmethod
    def backward(ctx, gradient):  # noqa: D102
        return ctx.back(gradient), None, None


def behind(
    ahead: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]
) -> Callable[[nn.Module], nn.Module]:
    """Return what puts a function with a backward pass of its own in front of a net."""

    class Faulty(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(Custom.apply(x, ahead, back))

    return Faulty


def same(x: Tensor) -> Tensor:
    """Return a copy."""
    return x.clone()


def rounded(levels: int) -> Callable[[Tensor], Tensor]:
    """Return rounding to so many steps."""
    return lambda x: (x * levels).round() / levels


def hashed(x: Tensor) -> Tensor:
    """Return images with noise that is a fixed but rough function of them: a shattered gradient."""
    return x + 0.05 * torch.sin(1e6 * x)


class Half(nn.Module):
    """A net that detaches a part of its input."""

    def __init__(self, net: nn.Module, rows: bool) -> None:
        super().__init__()
        self.net, self.rows = net, rows

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        if not self.rows:
            return self.net(x / 2 + x.detach() / 2)
        cut = x.shape[2] // 2
        return self.net(torch.cat([x[:, :, :cut], x[:, :, cut:].detach()], 2))


class Detached(nn.Module):
    """A sum of two nets' logits, of which one is detached: half of the function has no gradient."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.net(x) + 2 * self.net(x.flip(3)).detach()


class Elsewhere(nn.Module):
    """Logits of a net with the gradient of its logits at another image: that of another layer's input."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        other = self.net(F.avg_pool2d(x, 3, 1, 1).flip(2))
        return self.net(x).detach() + other - other.detach()


FAULTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "sign flipped": behind(same, lambda g: -g),
    "ten times too long": behind(same, lambda g: 10 * g),
    "twice too long": behind(same, lambda g: 2 * g),
    "half too short": lambda net: Half(net, rows=False),
    "lower half detached": lambda net: Half(net, rows=True),
    "one of two paths detached": Detached,
    "rolled by a pixel": behind(same, lambda g: g.roll(1, 3)),
    "random": behind(same, torch.randn_like),
    "of another layer": Elsewhere,
    "4 levels, straight through": behind(rounded(3), same),
    "16 levels, straight through": behind(rounded(15), same),
    "256 levels, straight through": behind(rounded(255), same),
    "shattered, straight through": behind(hashed, same),
}


def flagged(net: nn.Module, x: Tensor, y: Tensor) -> tuple[str, float]:
    """Return what the check says of a net, and the propagations that it took for each image."""
    model = as_classifier(net.eval())
    instrumented = InstrumentedModel(model, torch.device("cpu"))
    probe = Probe(instrumented, x, y, ThreatModel.parse("linf:4/255"), [], 0, model)
    with own_randomness("study"):
        probe.gradients  # noqa: B018  (the other checks need them as well)
        before = instrumented.forwards + instrumented.backwards
        flag = disagrees(probe)
    outcome = "flag" if flag.raised else "pass" if flag.value is not None else "unmeasured"
    return outcome, (instrumented.forwards + instrumented.backwards - before) / len(x)


def main() -> None:
    """Print the rates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cifar", type=Path, required=True)
    parser.add_argument("--nets", type=int, default=72)
    parser.add_argument("--verbose", action="store_true")
    arguments = parser.parse_args()
    sets = {}
    digits = load_data("digits:train")
    sets["digits"] = digits.images(range(len(digits))), torch.from_numpy(digits.labels)
    for name, path in (("mnist", arguments.data), ("cifar", arguments.cifar)):
        loaded = np.load(path)
        x, y = (torch.from_numpy(loaded[key][:4096]) for key in ("x", "y"))
        sets[name] = x.permute(0, 3, 1, 2).float() / 255, y
    settings = list(itertools.product(sets, ACTIVATIONS, POOLS, WEIGHTS, (False, True), (2, 3)))
    order = np.random.default_rng(0).permutation(len(settings))
    alarms: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    costs: dict[str, list[float]] = defaultdict(list)
    caught: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    begun = time.perf_counter()
    for number in range(arguments.nets):
        data, activation, pool, weights, norm, depth = settings[order[number]]
        scale, dtype = SCALES[number // 2 % len(SCALES)], TYPES[number // 2 % len(TYPES)]
        x, y = sets[data]
        torch.manual_seed(number)
        net = Net(x.shape[1], activation, pool, norm, depth, scale)
        net(x[:2])
        if weights != "random":
            fit(net, x, y, weights == "adversarial")
        net.eval().to(dtype)
        with torch.no_grad():
            predictions = net(x[-256:]).argmax(1)
        labels = predictions if weights == "random" else y[-256:]
        side = "held out" if number % 2 else "design"
        right = (predictions == labels).nonzero()[:, 0]
        for images in (32, *([1] * SINGLES)):
            rows, right = right[:images], right[images:] if images == 1 else right
            outcome, cost = flagged(net, x[-256:][rows], labels[rows])
            place = f"{side}, {'one image' if images == 1 else '32 images'}"
            alarms[place][("pass", "unmeasured", "flag").index(outcome)] += 1
            costs[place].append(cost)
            if arguments.verbose and outcome != "pass":
                print(number, data, activation, pool, weights, norm, depth, scale, dtype, images, outcome)
        if dtype is torch.float32 and weights != "random" and len(right) >= 32:
            for fault, put in FAULTS.items():
                for points, rows in enumerate((right[:32], right[:1])):
                    outcome, _ = flagged(put(net), x[-256:][rows], labels[rows])
                    caught[fault][2 * points] += outcome == "flag"
                    caught[fault][2 * points + 1] += 1
    print(f"{arguments.nets} nets with a correct gradient, {time.perf_counter() - begun:.0f} s")
    for place, (fine, unknown, raised) in sorted(alarms.items()):
        mean = sum(costs[place]) / len(costs[place])
        print(
            f"{place:22} wrong-gradient raised {raised:3} times, passed {fine:3}, not measured {unknown:3}; "
            f"{mean:.1f} propagations per image"
        )
    print("nets with a wrong gradient: flags among nets, 32 images and one image")
    for fault, (many, of, one, of_one) in caught.items():
        print(f"{fault:30} {many:3} of {of:3}   {one:3} of {of_one:3}")


if __name__ == "__main__":
    main()
