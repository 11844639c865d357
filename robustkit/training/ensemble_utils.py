"""Functions that training methods share: batch norm policies, gradient ascent, learning rates, default sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.attack_api.driver import drive
from robustkit.core.errors import did_you_mean
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images, Labels, Logits
from robustkit.core.threat import ThreatModel
from robustkit.models.layers.features import check_layer, depth
from robustkit.training.method import Batch, Plan, Size

# What batch norms do while images are perturbed; see `batch_norm_policy`.
BATCH_NORM_POLICIES = ("train", "frozen", "separate")
# When a random layer is drawn again: in each epoch, in each batch, or in each batch for each member.
LAYER_DRAWS = ("epoch", "batch", "member")


@contextmanager
def batch_norm_policy(nets: Sequence[nn.Module], policy: str) -> Iterator[None]:
    """Set what the batch norms of nets in train mode do inside the context.

    Args:
        nets: nets in train mode.
        policy: `train`: use the statistics of the batch and update the running ones. `frozen`: use the running
            ones. `separate`: use the statistics of the batch without updating the running ones.

    Raises:
        UsageError: for an unknown policy.
    """
    if policy not in BATCH_NORM_POLICIES:
        raise did_you_mean("statistics", policy, BATCH_NORM_POLICIES)
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


def drawn_layers(
    nets: Sequence[nn.Module], batch: Batch, plan: Plan, layer: str, draw: str, stream: str
) -> list[int | str]:
    """Return the layer of each net in a step, a function of seed and step only, so that runs resume bit for bit.

    Args:
        nets: members of this process.
        batch: the batch of the step.
        plan: the size of the run.
        layer: number of a layer, name of a module, or `random`.
        draw: when a random layer is drawn: for each `epoch`, `batch` or `member`. Unless it is `member`, all
            members get the same layer, as a share of their depths.
        stream: name of the random numbers.
    """
    if layer != "random":
        return [fixed_layer(nets, batch.x[:1], layer)] * len(nets)
    depths = [depth(net, batch.x[:1]) for net in nets]
    time = batch.step // plan.steps_per_epoch if draw == "epoch" else batch.step
    members = batch.process_group.first + torch.arange(len(nets))
    if draw != "member":
        members = torch.zeros_like(members)
    shares = RowRng(plan.seed, stream, members, step=time).uniform(1)[:, 0].tolist()
    return [1 + int(share * count) for share, count in zip(shares, depths, strict=True)]


def fixed_layer(nets: Sequence[nn.Module], image: Images, layer: str) -> int | str:
    """Return the number or name of a layer.

    Raises:
        UsageError: if one of the nets does not have it.
    """
    fixed = int(layer) if layer.isdecimal() else layer
    for net in nets:
        check_layer(net, fixed, depth(net, image))
    return fixed


def uniform_noise(batch: Batch, name: str) -> Tensor:
    """Return uniform noise in [-1, 1) of the shape (B C H W) of the images; another `name` gives other numbers."""
    rng = RowRng(batch.rng.seed, f"{batch.rng.stream}/{name}", batch.rng.ids, step=batch.rng.step)
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
    """Return images (B C H W) after projected gradient ascent on a value (B) of the images.

    Args:
        value: function of images (B C H W) that returns one value per image.
        start: first images, in the balls around `x`.
        x: centres of the balls (B C H W).
        threat: norm and eps of the balls.
        steps: number of steps.
        step_size: length of a step, as a share of eps.
    """

    def gradient(number: int, point: Images) -> Images:
        with torch.enable_grad():
            point = point.detach().requires_grad_()
            return torch.autograd.grad(value(point).sum(), point)[0]

    def step(number: int, point: Images, gradient: Images) -> Images:
        moved = point.detach() + step_size * float(threat.eps) * threat.ascent(gradient)
        return threat.project(moved, x)

    return drive(start, steps, gradient, step).detach()


def random_start(x: Images, threat: ThreatModel, rng: RowRng) -> Images:
    """Return a random point (B C H W) in the ball of each image."""
    return threat.random_start(x, rng).to(x.dtype)


def ensemble_log_probabilities(logits: Tensor) -> Logits:
    """Return the logarithm (B K) of the members' mean probabilities, given their logits (n B K).

    It does not underflow, so gradients do not vanish as they do with the clamp at 1e-40 of the authors' code.
    """
    return logits.float().log_softmax(2).logsumexp(0) - math.log(len(logits))


def step_decay(step: int, length: int, peak: float) -> float:
    """Return the learning rate that falls to a tenth at a half and again at three quarters of `length` steps."""
    done = step / max(length, 1)
    return peak * float(0.1 ** ((done >= 0.5) + (done >= 0.75)))


def baseline_steps(share: float, plan: Plan) -> int:
    """Return the number of steps of plain training at the beginning: whole epochs, at most this share of all."""
    return int(share * plan.epochs) * plan.steps_per_epoch


def two_phase_decay(step: int, share: float, plan: Plan) -> float:
    """Return the learning rate of a run in two phases, `baseline_steps` and the rest, each with `step_decay`."""
    baseline = baseline_steps(share, plan)
    if step < baseline:
        return step_decay(step, baseline, plan.lr)
    return step_decay(step - baseline, plan.steps - baseline, plan.lr)


def losses_and_gradients(nets: Sequence[nn.Module], x: Images, labels: Labels) -> tuple[Tensor, Tensor]:
    """Return the members' losses (n) and their input gradients (n B D); both are differentiable."""
    with torch.enable_grad():
        point = x if x.requires_grad else x.detach().requires_grad_()
        losses = torch.stack([F.cross_entropy(net(point), labels) for net in nets])
        slopes = [torch.autograd.grad(loss, point, create_graph=True)[0].flatten(1) for loss in losses]
    return losses, torch.stack(slopes)


def pairwise_cosines(slopes: Tensor) -> Tensor:
    """Return the cosines (pairs B) of all pairs of the members' gradients (n B D)."""
    # First divided by the largest entry: gradients of well-fitted images are so small that squares underflow.
    largest = slopes.detach().abs().amax(2, keepdim=True)
    unit = F.normalize(slopes / torch.where(largest > 0, largest, 1), dim=2)
    one, other = torch.triu_indices(len(slopes), len(slopes), 1, device=slopes.device)
    return (unit[one] * unit[other]).sum(2)


def adam(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Return Adam with the settings of the other methods in the comparison of the DVERGE paper."""
    return torch.optim.Adam(parameters, lr=lr, weight_decay=weight_decay, eps=1e-7)


def adam_size(samples: int, epochs: int = 200) -> Size:
    """Return the size in the DVERGE paper's comparison on CIFAR-10; a shorter run on a small set."""
    if samples > 5000:
        return Size(epochs=epochs, batch_size=128, lr=1e-3, members=3)
    return Size(epochs=40, batch_size=64, lr=3e-3, members=3)


def dverge_size(samples: int, few: int = 40) -> Size:
    """Return the size of DVERGE, with the 200 epochs of its baseline; `few` epochs on a small set."""
    if samples > 5000:
        return Size(epochs=400, batch_size=128, lr=0.1, members=3)
    return Size(epochs=few, batch_size=64, lr=0.02, members=3)


def sgd_size(samples: int, epochs: int) -> Size:
    """Return a common size for one net on CIFAR-10; a shorter run on a small set."""
    return Size(epochs=epochs, batch_size=128, lr=0.1) if samples > 5000 else Size(40, 64, 0.05)
