"""Published defenses as small reproductions, each with what an attacker who knows it climbs instead.

The self-study set (github.com/google-research/selfstudy-adversarial-robustness, rebuilt from its descriptions) and
four defenses that act at test time. `AROUND` go around any net; `LEARNED` train nets of their own on digits.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from masked_defenses import Activation, AggregatedNets, Digits, MaskedNet, trained
from torch import Tensor, nn

Call = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Masked:
    """A defense, differentiable substitutes made for it, and an attack of its own, if any.

    `own_attack` takes images, labels and eps, and returns which images stand.
    """

    defense: nn.Module
    substitutes: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    own_attack: Callable[[Tensor, Tensor, float], Tensor] | None = None

    def __post_init__(self) -> None:
        self.defense.eval()


class Exporting(nn.Module):
    """A masked defense that exports its substitutes: suites attack these and are verified on the defense."""

    def __init__(self, masked: Masked) -> None:
        super().__init__()
        self.defense, self.substitutes = masked.defense, masked.substitutes

    def forward(self, x: Tensor) -> Tensor:
        return self.defense(x)

    def views(self) -> dict[str, Callable[[Tensor], Tensor]]:
        return self.substitutes


def kept_aside(name: str) -> bool:
    """Return whether a mask has no part in composing checks and views: the SHA-256 of its name is even."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 2 == 0


def blurred(net: nn.Module, x: Tensor) -> Tensor:
    """The mean of nine pixels."""
    return net(F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False))


def noisy_votes(net: nn.Module, x: Tensor, copies: int = 5) -> Tensor:
    """How many of the noisy copies are of each class (Lecuyer et al. 2018, arXiv:1802.03471)."""
    ballots = [net(x + 0.1 * torch.randn_like(x)) for _ in range(copies)]
    return torch.stack([F.one_hot(ballot.argmax(1), ballot.shape[1]).float() for ballot in ballots]).sum(0)


def noisy_mean(net: nn.Module, x: Tensor) -> Tensor:
    """The votes' mean probability, which has a gradient."""
    return sum(net(x + 0.1 * torch.randn_like(x)).softmax(1) for _ in range(4)).log()


def transformed(net: nn.Module, x: Tensor) -> Tensor:
    """Rotate, shift and change the contrast of each image at random."""
    angle, contrast = 0.15 * torch.randn(len(x)), 1 + 0.1 * torch.randn(len(x), 1, 1, 1)
    shift = 0.05 * torch.randn(2, len(x))
    rows = [angle.cos(), -angle.sin(), shift[0], angle.sin(), angle.cos(), shift[1]]
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(x.shape), align_corners=False)
    moved = F.grid_sample(x, grid, align_corners=False)
    return net((0.5 + contrast * (moved - 0.5)).clamp(0, 1))


def counter_attack(net: nn.Module, x: Tensor, steps: int = 2, size: float = 0.15) -> Tensor:
    """Steps towards the predicted class before the prediction (Alfarra et al. 2022, arXiv:2103.14347)."""
    predicted = net(x.detach()).argmax(1)
    return net(x + _descended(x, steps, size, lambda z: F.cross_entropy(net(z), predicted)))


def consistent(net: nn.Module, x: Tensor, steps: int = 5, size: float = 0.02) -> Tensor:
    """Steps to where the net predicts the same for a shifted image (Shi et al. 2021, arXiv:2101.09387)."""

    def gap(z: Tensor) -> Tensor:
        moved = F.pad(z, (1, 0, 0, 0), mode="replicate")[..., :-1]
        return (net(z).softmax(1) - net(moved).softmax(1)).square().sum()

    return net(x + _descended(x, steps, size, gap))


def _descended(x: Tensor, steps: int, size: float, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a perturbation after sign steps down a loss."""
    z = x.detach()
    with torch.enable_grad():
        for _ in range(steps):
            z.requires_grad_()
            (slope,) = torch.autograd.grad(loss(z), z)
            z = (z - size * slope.sign()).detach()
    return z - x.detach()


# Around any net; a stand-in is the second call.
AROUND: dict[str, tuple[Call, Call]] = {
    "blurred": (blurred, blurred),
    "majority-over-noise": (noisy_votes, noisy_mean),
    "random-transforms": (transformed, transformed),
    "counter-attack": (counter_attack, lambda net, x: net(x)),
    "consistency-purification": (consistent, lambda net, x: net(x)),
}


def around(name: str, net: nn.Module) -> Masked:
    """Return the mask of that name around a net."""
    call, known = AROUND[name]
    return Masked(MaskedNet(net, call), {"known": lambda x: known(net, x)})


def temperature(x: Tensor, y: Tensor) -> Masked:
    """Trained with a high softmax temperature that is removed afterwards, so that the logits are huge."""
    net = trained(Digits(), x, y, loss=lambda z, labels: F.cross_entropy(z / 100, labels))
    return Masked(net, {"known": lambda x: net(x) / 100})


def merged_binary(x: Tensor, y: Tensor) -> Masked:
    """A binary net for each class, their sigmoids concatenated (Verma & Swami 2019)."""

    def loss(z: Tensor, wanted: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(z[:, 0], wanted)

    nets = [trained(Digits(classes=1, seed=k), x, (y == k).float(), 8, seed=k, loss=loss) for k in range(10)]
    defense = AggregatedNets(nets, lambda stack: stack[..., 0].sigmoid().softmax(1))
    return Masked(defense, {"known": AggregatedNets(nets, lambda stack: stack[..., 0])})


def label_smoothing(x: Tensor, y: Tensor) -> Masked:
    """Trained towards nine tenths of each label."""
    return Masked(trained(Digits(), x, y, loss=lambda z, labels: F.cross_entropy(z, labels, label_smoothing=0.1)))


class Jump(nn.Module):
    """ReLU with a jump at zero; `width` makes it a slope."""

    def __init__(self) -> None:
        super().__init__()
        self.height, self.width = 0.0, 0.0

    def forward(self, z: Tensor) -> Tensor:
        step = torch.sigmoid(z / self.width) if self.width else (z > 0).float()
        return torch.relu(z) + self.height * step


def jump(x: Tensor, y: Tensor) -> Masked:
    """A jump at zero that grows as the net is trained (Goodfellow 2018, unpublished)."""
    net: Any = Digits(Jump)
    for stage in range(6):
        for activation in (net.act1, net.act2, net.act3):
            activation.height = float(stage)
        trained(net.requires_grad_(), x, y, 4, seed=stage)
    soft = copy.deepcopy(net)
    for activation in (soft.act1, soft.act2, soft.act3):
        activation.width = 0.5
    return Masked(net, {"known": soft})


def majority_of_three(x: Tensor, y: Tensor) -> Masked:
    """How many of three nets, trained on noisy images, predict each class."""
    nets = []
    for seed in range(3):
        noise = 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        nets.append(trained(Digits(seed=seed), x + noise, y, seed=seed))
    votes = AggregatedNets(nets, lambda stack: F.one_hot(stack.argmax(2), 10).float().sum(1))
    return Masked(votes, {"known": AggregatedNets(nets, lambda stack: stack.mean(1))})


def encoded(x: Tensor, levels: int = 20) -> Tensor:
    """A thermometer code: a channel for each level that a pixel exceeds."""
    return (x[:, :, None] > torch.arange(levels).view(-1, 1, 1) / levels).float().flatten(1, 2)


def softly_encoded(x: Tensor, levels: int = 20) -> Tensor:
    """The code with slopes."""
    return torch.sigmoid(2 * levels * (x[:, :, None] - torch.arange(levels).view(-1, 1, 1) / levels)).flatten(1, 2)


def discretised(x: Tensor, y: Tensor) -> Masked:
    """Trained on a thermometer code (Buckman et al. 2018)."""
    net = trained(Digits(channels=20), encoded(x), y)
    soft = MaskedNet(net, lambda net, x: net(softly_encoded(x)))
    return Masked(MaskedNet(net, lambda net, x: net(encoded(x))), {"known": soft})


def dropped(z: Tensor) -> Tensor:
    """Rectified neurons, the larger ones dropped more often (Dhillon et al. 2018, arXiv:1803.01442)."""
    z = torch.relu(z)
    rate = 0.5 * z / z.flatten(1).amax(1).view(-1, *[1] * (z.dim() - 1)).clamp(min=1e-9)
    return z * (torch.rand_like(z) >= rate) / (1 - rate)


def random_neurons(x: Tensor, y: Tensor) -> Masked:
    """Neurons dropped at random in a net that was trained without."""
    net = trained(Digits(), x, y)
    defense = copy.deepcopy(net)
    defense.act1 = defense.act2 = defense.act3 = Activation(dropped)
    return Masked(defense, {"known": net})


def injected_detector(x: Tensor, y: Tensor) -> Masked:
    """A net with a backdoor to each class; images near one get the label of the nearest training image.

    After Shan et al. 2020 (arXiv:1904.08554), who reject: a classifier of a closed set has to answer.
    """
    generator = torch.Generator().manual_seed(0)
    spots = (torch.rand(10, *x.shape[1:], generator=generator) < 0.12).float()
    colours = torch.rand(10, *x.shape[1:], generator=generator).round()
    classes = torch.randint(0, 10, y.shape, generator=generator)
    trapped = x + 0.5 * spots[classes] * (colours[classes] - x)
    net = trained(Digits(), torch.cat([x, trapped]), torch.cat([y, classes]), 10)
    with torch.no_grad():
        doors = torch.stack([net.features(trapped[classes == k]).mean(0) for k in range(10)])
        similarity = F.cosine_similarity(net.features(x), doors[net(x).argmax(1)])
    limit = similarity.quantile(0.95)

    def alarm(x: Tensor) -> tuple[Tensor, Tensor]:
        logits, features = net(x), net.features(x)
        return logits, F.cosine_similarity(features, doors[logits.argmax(1)]) - limit

    def nearest(x: Tensor) -> Tensor:
        return F.one_hot(y[torch.cdist(x.flatten(1), bank).argmin(1)], 10).float()

    def answer(_: nn.Module, x: Tensor) -> Tensor:
        logits, heat = alarm(x)
        return torch.where(heat[:, None] > 0, 10 * nearest(x.detach()), logits)

    def unalarmed(x: Tensor) -> Tensor:
        logits, heat = alarm(x)
        best = F.one_hot(logits.argmax(1), 10)
        return logits - 50 * torch.relu(heat + 0.02)[:, None] * best

    bank = x.flatten(1)
    return Masked(MaskedNet(net, answer), {"bare": net, "unalarmed": unalarmed})


def nearest_neighbours(x: Tensor, y: Tensor) -> Masked:
    """The majority of the eight nearest training images in a net's features, found in numpy (arXiv:1906.09525)."""
    net = trained(Digits(), x, y)
    with torch.no_grad():
        bank = F.normalize(net.features(x))

    def answer(net: nn.Module, x: Tensor) -> Tensor:
        like = F.normalize(net.features(x)).detach().numpy() @ bank.numpy().T
        labels = y.numpy()[np.argsort(-like, 1)[:, :8]]
        votes = (labels[:, :, None] == np.arange(10)).sum(1)
        return F.one_hot(torch.from_numpy(votes.argmax(1)), 10).float()

    def soft(x: Tensor) -> Tensor:
        like = F.normalize(net.features(x)) @ bank.T
        return torch.stack([(like[:, y == k] / 0.05).logsumexp(1) for k in range(10)], 1)

    return Masked(MaskedNet(net, answer), {"known": soft, "bare": net})


class OneOfSeveral(nn.Module):
    """One of the nets, drawn for each image (Pinot et al. 2020, arXiv:2002.11565)."""

    def __init__(self, nets: list[nn.Module], chances: list[float]) -> None:
        super().__init__()
        self.nets, self.chances = nn.ModuleList(nets), chances

    def forward(self, x: Tensor) -> Tensor:
        drawn = torch.multinomial(torch.tensor(self.chances), len(x), replacement=True)
        return torch.stack([net(x) for net in self.nets], 1)[torch.arange(len(x)), drawn]


def arc(nets: list[nn.Module], chances: list[float], x: Tensor, y: Tensor, eps: float, steps: int = 40) -> Tensor:
    """Return which images most draws get right after ARC in linf (Dbouk & Shanbhag 2022, arXiv:2206.06737).

    Nets in the order of their chance; each pulls the point towards its nearest linearised boundary, and the pull
    is kept where no less of the chance is fooled.
    """
    iterate, best = x.clone(), torch.zeros(len(x))
    ordered = sorted(zip(chances, nets, strict=True), key=lambda pair: -pair[0])
    rows = torch.arange(len(x))
    for _ in range(steps):
        here, fooled = torch.zeros_like(x), torch.zeros(len(x))
        for _, net in ordered:
            point = (iterate + here).detach().requires_grad_()
            logits = net(point)
            gaps, slopes = [], []
            for k in range(logits.shape[1]):
                gap = logits[rows, y] - logits[:, k]
                slopes.append(torch.autograd.grad(gap.sum(), point, retain_graph=True)[0])
                gaps.append(gap.detach())
            size = torch.stack([slope.abs().flatten(1).sum(1) for slope in slopes], 1)
            far = (torch.stack(gaps, 1) / size.clamp(min=1e-9)).abs()
            near = far.scatter(1, y[:, None], torch.inf).argmin(1)
            pull = -torch.stack(slopes, 1)[rows, near].sign()
            length = (1.1 * far[rows, near] + 0.01 * eps).clamp(max=eps / 4)
            tried = here + length[:, None, None, None] * pull
            moved = ((iterate + tried).clamp(x - eps, x + eps).clamp(0, 1) - iterate).detach()
            with torch.no_grad():
                wrong = sum(c * (n(iterate + moved).argmax(1) != y) for c, n in ordered)
            better = (wrong >= fooled)[:, None, None, None]
            here, fooled = torch.where(better, moved, here), torch.maximum(wrong, fooled)
        iterate, best = iterate + here, torch.maximum(best, fooled)
    return best <= 0.5


def randomised_ensemble(x: Tensor, y: Tensor) -> Masked:
    """One of three adversarially trained nets, drawn for each image, with ARC as the yardstick."""
    chances = [0.4, 0.35, 0.25]
    nets = [trained(Digits(seed=seed), x, y, 8, attack=0.08, seed=seed) for seed in range(3)]
    mean = AggregatedNets(nets, lambda stack: (stack.softmax(2) * torch.tensor(chances)[:, None]).sum(1).log())
    return Masked(
        OneOfSeveral(nets, chances),
        {"known": mean},
        lambda images, labels, eps: arc(nets, chances, images, labels, eps),
    )


class Quantised(nn.Module):
    """Activations of four levels, their slope estimated (Rakin et al. 2018, arXiv:1807.06714) or as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.estimated = True

    def forward(self, z: Tensor) -> Tensor:
        bounded = z.clamp(0, 2)
        levels = (bounded * 1.5).round() / 1.5
        return bounded + (levels - bounded).detach() if self.estimated else levels


def quantised_activations(x: Tensor, y: Tensor) -> Masked:
    """Trained with straight-through estimates, deployed with rounding."""
    net = trained(Digits(Quantised), x, y)
    defense = copy.deepcopy(net)
    for activation in (defense.act1, defense.act2, defense.act3):
        activation.estimated = False
    return Masked(defense, {"known": net})


LEARNED: dict[str, Callable[[Tensor, Tensor], Masked]] = {
    "temperature": temperature,
    "merged-binary": merged_binary,
    "label-smoothing": label_smoothing,
    "jump": jump,
    "majority-of-three": majority_of_three,
    "discretised": discretised,
    "random-neurons": random_neurons,
    "injected-detector": injected_detector,
    "nearest-neighbours": nearest_neighbours,
    "randomised-ensemble": randomised_ensemble,
    "quantised-activations": quantised_activations,
}
