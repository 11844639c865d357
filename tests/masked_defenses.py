"""Masked defenses around one small net, most of which a direct gradient attack overestimates."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MaskedNet(nn.Module):
    """A net with a mask: a function `(net, x) -> logits`."""

    def __init__(self, net: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.call = net, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.net, x)


class RandomBackward(torch.autograd.Function):
    """The identity with a random gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.randn_like(gradient)


class RoundingWithoutGradient(torch.autograd.Function):
    """Rounding without a gradient."""

    @staticmethod
    def forward(ctx, x):
        return (x * 8).round() / 8

    @staticmethod
    def backward(ctx, gradient):
        return torch.zeros_like(gradient)


def jpeg(x: Tensor, quality: int = 50) -> Tensor:
    """Compress each image as JPEG by Pillow."""
    from PIL import Image

    out = []
    for image in x.detach():
        file = io.BytesIO()
        array = (image.clamp(0, 1) * 255).byte().permute(1, 2, 0).squeeze(2).cpu().numpy()
        Image.fromarray(array).save(file, "JPEG", quality=quality)
        again = np.array(Image.open(file, formats=("JPEG",))).reshape(*array.shape[:2], -1)
        out.append(torch.from_numpy(again).permute(2, 0, 1).float() / 255)
    return torch.stack(out).to(x)


def resize_pad(x: Tensor) -> Tensor:
    """Resize each image at random, pad it to a larger black image at a random position, and resize it back."""
    side = x.shape[-1]
    size = int(torch.randint(side, side + 3, ()))
    left, top = (int(torch.randint(0, side + 3 - size, ())) for _ in range(2))
    big = F.interpolate(x, (size, size), mode="nearest")
    padded = F.pad(big, (left, side + 2 - size - left, top, side + 2 - size - top))
    return F.interpolate(padded, (side, side), mode="bilinear", align_corners=False)


def numpy_median(x: Tensor) -> Tensor:
    """A median filter in numpy, as scipy's."""
    array = x.detach().cpu().numpy()
    padded = np.pad(array, ((0, 0), (0, 0), (0, 1), (0, 1)), mode="edge")
    stack = [padded[:, :, i : i + x.shape[2], j : j + x.shape[3]] for i in range(2) for j in range(2)]
    return torch.from_numpy(np.median(np.stack(stack), 0).astype(np.float32)).to(x)


@torch.no_grad()
def hidden(net: nn.Module, x: Tensor) -> Tensor:
    return net(x)


def blind(net: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return net(x).clone()


def thermometer(x: Tensor, levels: int = 16) -> Tensor:
    """Decoded from a thermometer code."""
    thresholds = torch.arange(levels, device=x.device).view(-1, 1, 1) / levels
    return (x > thresholds).float().sum(1, keepdim=True) / levels


def one_hot(x: Tensor, levels: int = 16) -> Tensor:
    """Looked up by level."""
    index = (x * (levels - 1)).round().long()
    code = F.one_hot(index, levels).float()
    return code @ torch.linspace(0, 1, levels)


def lookup(x: Tensor, levels: int = 16) -> Tensor:
    table = torch.linspace(0, 1, levels)
    return table[(x * (levels - 1)).round().long()]


def low_rank(x: Tensor, rank: int = 4) -> Tensor:
    """The largest singular values only, in numpy."""
    left, values, right = np.linalg.svd(x.detach().cpu().numpy())
    values[..., rank:] = 0
    return torch.from_numpy((left * values[..., None, :]) @ right).to(x)


def completed(x: Tensor, kept: float = 0.8) -> Tensor:
    """Pixels dropped at random and filled in by shrunken singular values (Yang et al. 2019, arXiv:1905.11971)."""
    mask = (torch.rand_like(x) < kept) / kept
    left, values, right = np.linalg.svd((x * mask).detach().cpu().numpy())
    whole = (left * np.maximum(values - 0.3, 0)[..., None, :]) @ right
    return torch.from_numpy(whole).to(x).clamp(0, 1)


def sparse_spectrum(x: Tensor, kept: int = 16) -> Tensor:
    """The largest coefficients of each image's spectrum only."""
    spectrum = torch.fft.fft2(x)
    size = spectrum.abs()
    least = size.flatten(1).topk(kept).values[:, -1]
    return torch.fft.ifft2(spectrum * (size >= least[:, None, None, None])).real.clamp(0, 1)


def purified(net: nn.Module, x: Tensor) -> Tensor:
    """Steps at test time that raise the confidence of the net before its prediction."""
    z = x.detach()
    with torch.enable_grad():
        for _ in range(3):
            z.requires_grad_()
            (slope,) = torch.autograd.grad(net(z).logsumexp(1).sum(), z)
            z = (z + 0.02 * slope.sign()).detach()
    return net(z)


def shattered(x: Tensor) -> Tensor:
    return x + 0.01 * torch.sin(1e5 * x)


def crossmax(stack: Tensor) -> Tensor:
    apart = stack - stack.amax(2, keepdim=True)
    apart = apart - apart.amax(1, keepdim=True)
    return apart.median(1).values


def by_hand(z: Tensor) -> Tensor:
    """Probabilities at a tiny temperature."""
    return (z / 1e-3).softmax(1)


# Around a trained net, whose own robustness is the truth.
AROUND: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "input-noise": lambda net, x: net(x + 0.1 * torch.randn_like(x)),
    "numpy-noise": lambda net, x: net(x + 0.1 * torch.from_numpy(np.random.randn(*x.shape).astype(np.float32))),
    "jpeg": lambda net, x: net(jpeg(x)),
    "bit-depth": lambda net, x: net((x * 7).round() / 7),
    "cold": lambda net, x: net(x) / 1e-4,
    "cold-probabilities": lambda net, x: by_hand(net(x)),
    "hot": lambda net, x: (net(x) / 1e6).softmax(1),
    "probabilities": lambda net, x: net(x).softmax(1),
    "rounded-logits": lambda net, x: net(x).round(),
    "rounded-probabilities": lambda net, x: (net(x).softmax(1) * 100).round() / 100,
    "detached": lambda net, x: net(x.detach() * 1.0),
    "data": lambda net, x: net(x.data.clone()),
    "half-detached": lambda net, x: net(2 * x.detach() - x),
    "straight-through-wrong": lambda net, x: net((x + (x.flip(3) - x.flip(3).detach())) - (x - x.detach())),
    "resize-pad": lambda net, x: net(resize_pad(x)),
    "lying": lambda net, x: net(RandomBackward.apply(x)),
    "blunt": lambda net, x: net(RoundingWithoutGradient.apply(x)),
    "no-grad": hidden,
    "inference": blind,
    "thermometer": lambda net, x: net(thermometer(x)),
    "one-hot": lambda net, x: net(one_hot(x)),
    "lookup": lambda net, x: net(lookup(x)),
    "numpy-median": lambda net, x: net(numpy_median(x)),
    "shattered": lambda net, x: net(shattered(x)),
    "clamped-logits": lambda net, x: net(x).clamp(-1, 1) + 1e-4 * net(x),
    "argmax": lambda net, x: F.one_hot(net(x).argmax(1), 10).float(),
    "noisy-logits": lambda net, x: net(x) + 0.3 * torch.randn(len(x), 10),
    "tanh-logits": lambda net, x: torch.tanh(50 * net(x)) + 1e-6 * net(x),
    "hooked": lambda net, x: net(_hooked(x)),
    "content-noise": lambda net, x: net(x + 0.1 * _content_noise(x)),
    "low-rank": lambda net, x: net(low_rank(x)),
    "completed": lambda net, x: net(completed(x)),
    "sparse-spectrum": lambda net, x: net(sparse_spectrum(x)),
    "purified": purified,
    "half-precision": lambda net, x: (1000 * net(x)).half().round().float(),
    "abroad": lambda net, x: torch.from_numpy(net(x.detach()).detach().numpy().copy()),
}


def _hooked(x: Tensor) -> Tensor:
    y = x * 1
    if y.requires_grad:
        y.register_hook(torch.zeros_like)
    return y


def _content_noise(x: Tensor) -> Tensor:
    """Noise that is a function of the image alone."""
    rows = []
    for image in x.detach():
        generator = torch.Generator().manual_seed(int(image.double().sum() * 1e9) % 2**31)
        rows.append(torch.randn(image.shape, generator=generator))
    return torch.stack(rows)


class KWinners(nn.Module):
    """Keeps the largest share of each image's activations (Xiao et al. 2020, arXiv:1905.10510)."""

    def __init__(self, share: float = 0.2, how: str = "threshold") -> None:
        super().__init__()
        self.share, self.how = share, how

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        best = flat.topk(max(1, int(self.share * flat.shape[1])), 1)
        if self.how == "threshold":
            return (flat * (flat >= best.values[:, -1:])).view_as(x)
        if self.how == "where":
            return torch.where(flat >= best.values[:, -1:], flat, torch.zeros_like(flat)).view_as(x)
        if self.how == "fill":
            return flat.masked_fill(flat < best.values[:, -1:], 0.0).view_as(x)
        if self.how == "assign":
            kept = flat.clone()
            kept[flat < best.values[:, -1:]] = 0
            return kept.view_as(x)
        mask = torch.zeros_like(flat).scatter_(1, best.indices, 1.0)
        return (flat * mask).view_as(x)


class Activation(nn.Module):
    """An activation as a function."""

    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


class StraightThroughSign(torch.autograd.Function):
    """Signs with a straight-through gradient."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (ctx.saved_tensors[0].abs() <= 1)


class Digits(nn.Module):
    """Three layers; the third is applied with probability `skip`."""

    def __init__(
        self, train: Callable[[], nn.Module] = nn.ReLU, seed: int = 0, channels: int = 1, classes: int = 10
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.one = nn.Conv2d(channels, 8, 3, padding=1)
            self.two = nn.Conv2d(8, 16, 3, stride=2, padding=1)
            self.three, self.skip = nn.Conv2d(16, 16, 3, padding=1), 1.0
            self.head = nn.Linear(256, classes)
            self.act1, self.act2, self.act3 = train(), train(), train()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        h = self.act1(self.one(4 * (x - 0.5)))
        h = self.act2(self.two(h))
        branch = self.act3(self.three(h))
        if self.skip < 1:
            branch = branch * (torch.rand(len(x), 1, 1, 1, device=x.device) < self.skip) / self.skip
        return (h + branch).flatten(1)


def trained(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    epochs: int = 20,
    attack: float = 0.0,
    seed: int = 0,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> nn.Module:
    """Return the net after Adam on images, or on those of PGD-5 in an l-infinity ball of this size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        optimiser = torch.optim.Adam(net.parameters(), 3e-3)
        net.train()
        for _ in range(epochs):
            for index in torch.randperm(len(x)).split(64):
                images, labels = x[index], y[index]
                point = images
                for _ in range(5 if attack else 0):
                    point = point.detach().requires_grad_()
                    (slope,) = torch.autograd.grad(F.cross_entropy(net(point), labels), point)
                    point = (point + attack / 3 * slope.sign()).clamp(images - attack, images + attack).clamp(0, 1)
                optimiser.zero_grad()
                loss(net(point.detach()), labels).backward()
                optimiser.step()
    return net.eval().requires_grad_(False)


class AggregatedNets(nn.Module):
    """Several nets and a rule that aggregates their logits."""

    def __init__(self, nets: list[nn.Module], rule: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.nets, self.rule = nn.ModuleList(nets), rule

    def forward(self, x: Tensor) -> Tensor:
        return self.rule(torch.stack([net(x) for net in self.nets], 1))
