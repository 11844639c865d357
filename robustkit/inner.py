"""What methods of training share whose batches are made by the nets themselves: batch norms, ascent, rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.errors import did_you_mean
from robustkit.method import Size
from robustkit.rng import RowRng
from robustkit.shapes import Images, Labels, Logits
from robustkit.threat import ThreatModel

# What batch norms do while images are made.
STATISTICS = ("train", "frozen", "separate")


@contextmanager
def statistics(nets: Sequence[nn.Module], policy: str) -> Iterator[None]:
    """Let batch norms of nets in train mode follow a policy for a while.

    `train`: the batch's statistics, which also move the running ones. `frozen`: the running ones. `separate`:
    the batch's own, and the running ones stay.
    """
    if policy not in STATISTICS:
        raise did_you_mean("statistics", policy, STATISTICS)
    norms = [] if policy == "train" else [part for net in nets for part in net.modules() if _normalises(part)]
    before = [(norm, norm.training, bool(norm.track_running_stats)) for norm in norms]
    for norm, training, tracks in before:
        norm.training = training and policy == "separate"
        norm.track_running_stats = tracks and policy == "frozen"  # type: ignore[assignment]
    try:
        yield
    finally:
        for norm, training, tracks in before:
            norm.training, norm.track_running_stats = training, tracks  # type: ignore[assignment]


def _normalises(part: nn.Module) -> bool:
    return isinstance(part, nn.modules.batchnorm._BatchNorm)


def ascend(
    value: Callable[[Images], Tensor],
    start: Images,
    x: Images,
    threat: ThreatModel,
    *,
    steps: int,
    step_size: float,
) -> Images:
    """Return the end of `steps` projected steps, each `step_size` times eps, up a value (B) of the images."""
    at = start
    for _ in range(steps):
        with torch.enable_grad():
            at = at.detach().requires_grad_()
            (slope,) = torch.autograd.grad(value(at).sum(), at)
        at = threat.project(at.detach() + step_size * float(threat.eps) * threat.ascent(slope), x)
    return at.detach()


def random_start(x: Images, threat: ThreatModel, rng: RowRng) -> Images:
    """Return a point of each image's ball."""
    return threat.random_start(x, rng).to(x.dtype)


def mixed(logits: Tensor) -> Logits:
    """Return the logarithms of the members' mean probabilities (B K), of their logits (n B K).

    No product underflows, so no gradient vanishes where the authors' clamp at 1e-40 makes it.
    """
    return logits.float().log_softmax(2).logsumexp(0) - math.log(len(logits))


def tenfold(step: int, length: int, peak: float) -> float:
    """Return the rate that falls to a tenth at a half, and again at three quarters, of `length` steps."""
    done = step / max(length, 1)
    return peak * float(0.1 ** ((done >= 0.5) + (done >= 0.75)))


def sloped(nets: Sequence[nn.Module], x: Images, labels: Labels) -> tuple[Tensor, Tensor]:
    """Return members' losses (n) and their gradients in the images (n B D), through which gradients go on."""
    with torch.enable_grad():
        at = x if x.requires_grad else x.detach().requires_grad_()
        losses = torch.stack([F.cross_entropy(net(at), labels) for net in nets])
        slopes = [torch.autograd.grad(loss, at, create_graph=True)[0].flatten(1) for loss in losses]
    return losses, torch.stack(slopes)


def cosines(slopes: Tensor) -> Tensor:
    """Return the cosines (pairs B) of all pairs of members' gradients (n B D)."""
    # Normalised first by their largest: gradients of well-learnt images are small enough to underflow in a square.
    largest = slopes.detach().abs().amax(2, keepdim=True)
    unit = F.normalize(slopes / torch.where(largest > 0, largest, 1), dim=2)
    one, other = torch.triu_indices(len(slopes), len(slopes), 1, device=slopes.device)
    return (unit[one] * unit[other]).sum(2)


def adam(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Return Adam as DVERGE's comparison sets it for its rivals."""
    return torch.optim.Adam(parameters, lr=lr, weight_decay=weight_decay, eps=1e-7)


def adam_size(samples: int, epochs: int = 200) -> Size:
    """Return the size of DVERGE's comparison on CIFAR-10; less on a small set."""
    if samples > 5000:
        return Size(epochs=epochs, batch_size=128, lr=1e-3, members=3)
    return Size(epochs=40, batch_size=64, lr=3e-3, members=3)


def sgd_size(samples: int, epochs: int) -> Size:
    """Return what is usual on CIFAR-10 for one net; less on a small set."""
    return Size(epochs=epochs, batch_size=128, lr=0.1) if samples > 5000 else Size(40, 64, 0.05)
