"""What methods of training share whose batches are made by the nets themselves: batch norms, ascent, rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.core.errors import did_you_mean
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images, Labels, Logits
from robustkit.core.threat import ThreatModel
from robustkit.models.layers.features import check_layer, depth
from robustkit.training.method import Batch, Plan, Size

# What batch norms do while images are made.
STATISTICS = ("train", "frozen", "separate")
# For how long a layer that is drawn stays.
DRAWS = ("epoch", "batch", "member")


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


def layers(
    nets: Sequence[nn.Module], batch: Batch, plan: Plan, layer: str, draw: str, stream: str
) -> list[int | str]:
    """Return the layer of each of these nets at a step: a function of the seed and the step alone, so it resumes.

    `layer` is a number, a module's name, or `random`: drawn for each `epoch`, `batch` or `member` (`draw`), the
    same for all members as a share of their depths, which are equal in one architecture.
    """
    if layer != "random":
        return [fixed_layer(nets, batch.x[:1], layer)] * len(nets)
    depths = [depth(net, batch.x[:1]) for net in nets]
    time = batch.step // plan.steps_per_epoch if draw == "epoch" else batch.step
    who = batch.peers.first + torch.arange(len(nets))
    if draw != "member":
        who = torch.zeros_like(who)
    words = RowRng(plan.seed, stream, who, step=time).uniform(1)[:, 0].tolist()
    return [1 + int(word * count) for word, count in zip(words, depths, strict=True)]


def fixed_layer(nets: Sequence[nn.Module], image: Images, layer: str) -> int | str:
    """Return the number or the name of a layer that all of these nets have.

    Raises:
        UsageError: if one of them has not.
    """
    fixed = int(layer) if layer.isdecimal() else layer
    for net in nets:
        check_layer(net, fixed, depth(net, image))
    return fixed


def in_ball(batch: Batch, whose: str) -> Tensor:
    """Return a number in [-1, 1) for each pixel of the batch; `whose` tells draws of one step apart."""
    rng = RowRng(batch.rng.seed, f"{batch.rng.stream}/{whose}", batch.rng.ids, step=batch.rng.step)
    return (2 * rng.uniform(batch.x[0].numel()) - 1).view_as(batch.x)


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


def plain_steps(share: float, plan: Plan) -> int:
    """Return how many steps come first that are plain training: whole epochs, at most this share of all."""
    return int(share * plan.epochs) * plan.steps_per_epoch


def twofold(step: int, plain: int, plan: Plan) -> float:
    """Return the rate of a run in two parts, each `tenfold`."""
    if step < plain:
        return tenfold(step, plain, plan.lr)
    return tenfold(step - plain, plan.steps - plain, plan.lr)


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


def diverse_size(samples: int, few: int = 40) -> Size:
    """Return DVERGE's size, the 200 epochs of its baseline included; `few` epochs on a small set."""
    if samples > 5000:
        return Size(epochs=400, batch_size=128, lr=0.1, members=3)
    return Size(epochs=few, batch_size=64, lr=0.02, members=3)


def sgd_size(samples: int, epochs: int) -> Size:
    """Return what is usual on CIFAR-10 for one net; less on a small set."""
    return Size(epochs=epochs, batch_size=128, lr=0.1) if samples > 5000 else Size(40, 64, 0.05)
