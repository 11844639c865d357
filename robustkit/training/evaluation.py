"""Accuracy of nets on held-out images, and running statistics of batch norms for given weights."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.core.errors import RunError
from robustkit.models.randomness import Noise, drawn
from robustkit.training.images import ImageSet

_CHUNK = 500


@torch.no_grad()
def log_probabilities(net: nn.Module, images: ImageSet) -> Tensor:
    """Return the log-probabilities (N K) of a net in eval mode; its mode is restored.

    A net with a policy of random numbers draws them from the images' content, so that the result is reproducible.
    """
    before = net.training
    net.eval()
    with drawn(net, Noise("content")):
        outputs = [
            net(images.at(slice(row, row + _CHUNK))).log_softmax(1) for row in range(0, len(images), _CHUNK)
        ]
    net.train(before)
    return torch.cat(outputs)


def accuracy_and_loss(scores: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return accuracy and mean negative log-likelihood of log-probabilities (N K) for labels (N).

    Raises:
        RunError: if the negative log-likelihood is not finite.
    """
    loss = float(F.nll_loss(scores, labels))
    if not math.isfinite(loss):
        raise RunError(
            f"the loss on the test images is {loss}: the training has diverged; give a smaller --lr in another "
            "folder."
        )
    return float((scores.argmax(1) == labels).float().mean()), loss


def mean_of_probabilities(scores: Iterable[Tensor]) -> Tensor:
    """Return the logarithm (N K) of the mean of probabilities, given their logarithms (N K) one after another."""
    total, count = None, 0
    for one in scores:
        total, count = one if total is None else torch.logaddexp(total, one), count + 1
    if total is None:
        raise ValueError("there are no log-probabilities to average")
    return total - torch.tensor(count).log()


@torch.no_grad()
def re_estimate_batch_norms(
    net: nn.Module, images: ImageSet, batch_size: int, order: Tensor | None = None
) -> None:
    """Set the running statistics of all batch norms to the mean over full batches of the images, in place.

    Args:
        net: a net with batch norms; its mode is restored.
        images: the training images.
        batch_size: images per batch.
        order: permutation (N) of the images. In a set sorted by class each batch would contain one class, and its
            variance would differ from that of the training batches.
    """
    norms = [part for part in net.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over batches
    before = net.training
    net.train()
    for row in range(0, len(images) - batch_size + 1, batch_size):
        rows = slice(row, row + batch_size)
        net(images.at(rows if order is None else order[rows]))
    net.train(before)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
