"""A cheap estimate of ensemble diversity during training; `robustkit diversity` measures it properly.

It uses a few held-out images and a short attack without restarts: compare its numbers within a run only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images, Labels
from robustkit.core.threat import ThreatModel
from robustkit.data.catalog import CATALOG
from robustkit.data.strings import DataString
from robustkit.training import ensemble_utils
from robustkit.training.images import ImageSet

# Bounds of the estimates in a run, and of the images and attack steps of each.
MAX_EVALUATIONS, MAX_IMAGES, ATTACK_STEPS = 10, 64, 5
DEFAULT_THREAT = "linf:8/255"


def default_threat(data: str) -> ThreatModel:
    """Return the threat of the data set if it has one, else linf:8/255."""
    entry = CATALOG.get(DataString.parse(data).name)
    return ThreatModel.parse(DEFAULT_THREAT if entry is None or entry.threat is None else entry.threat)


def oracle_accuracies(scores: Sequence[Tensor], labels: Labels) -> dict[str, float]:
    """Return accuracies over the members' scores (N K each): of the best, of any correct and of all correct."""
    right = torch.stack([one.argmax(1) == labels for one in scores])
    return {
        "best_member": float(right.float().mean(1).max()),
        "any_right": float(right.any(0).float().mean()),
        "all_right": float(right.all(0).float().mean()),
    }


def quick_diversity(
    nets: Sequence[nn.Module], test: ImageSet, trained_on: int, threat: ThreatModel
) -> dict[str, float]:
    """Return rates of fooled images and the mean cosine of the members' input gradients.

    Ten estimates in a run of forty epochs take 5 to 6 % of the time of plain training.

    Args:
        nets: the members; their modes are restored.
        test: held-out images, of which at most 64 are used.
        trained_on: number of training images, which bounds the number of test images too.
        threat: threat model of the attack.

    Returns:
        `transfer`: rate at which examples made on one member fool another; `white_box`: rate at which an attack on
        the members' mean probabilities fools it; `cosine`: mean cosine of the input gradients of two members.
    """
    count = min(MAX_IMAGES, max(trained_on // 50, 8), len(test))
    x, labels = test.at(slice(0, count)), test.labels[:count]
    modes = [(part, part.training) for net in nets for part in net.modules()]
    for net in nets:
        net.eval()
    try:
        start = ensemble_utils.random_start(x, threat, RowRng(0, "glance", torch.arange(len(x), device=x.device)))
        return {
            "transfer": _transfer(nets, start, x, labels, threat),
            "white_box": _white_box(nets, start, x, labels, threat),
            "cosine": _cosine(nets, x, labels),
        }
    finally:
        for part, training in modes:
            part.training = training


def _transfer(nets: Sequence[nn.Module], start: Images, x: Images, labels: Labels, threat: ThreatModel) -> float:
    """Return the rate, over pairs of members, at which examples of one fool the other on its correct images."""
    with torch.no_grad():
        right = [net(x).argmax(1) == labels for net in nets]
    hits = tries = torch.zeros((), device=x.device)
    for number, net in enumerate(nets):

        def value(images: Images, net: nn.Module = net) -> Tensor:
            return F.cross_entropy(net(images), labels, reduction="none")

        made = ensemble_utils.ascend(value, start, x, threat, steps=ATTACK_STEPS, step_size=0.4)
        with torch.no_grad():
            for other in range(len(nets)):
                if other != number:
                    hits = hits + (right[other] & (nets[other](made).argmax(1) != labels)).sum()
                    tries = tries + right[other].sum()
    return float(hits / tries.clamp(min=1))


def _white_box(nets: Sequence[nn.Module], start: Images, x: Images, labels: Labels, threat: ThreatModel) -> float:
    """Return the rate at which correctly classified images of the mean probabilities are fooled; 0 for none."""

    def mean_output(images: Images) -> Tensor:
        return ensemble_utils.ensemble_log_probabilities(torch.stack([net(images) for net in nets]))

    def value(images: Images) -> Tensor:
        return F.nll_loss(mean_output(images), labels, reduction="none")

    made = ensemble_utils.ascend(value, start, x, threat, steps=ATTACK_STEPS, step_size=0.4)
    with torch.no_grad():
        right = mean_output(x).argmax(1) == labels
        hits = right & (mean_output(made).argmax(1) != labels)
    return float(hits.sum() / right.sum().clamp(min=1))


def _cosine(nets: Sequence[nn.Module], x: Images, labels: Labels) -> float:
    _, slopes = ensemble_utils.losses_and_gradients(nets, x, labels)
    return float(ensemble_utils.pairwise_cosines(slopes.detach()).mean())
