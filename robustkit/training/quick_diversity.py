"""Whether members share weaknesses, looked at cheaply as they are trained; `robustkit diversity` looks properly.

A few held-out images, a short attack without restarts: figures to follow over a run, not to quote.
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

# Looks of a run, at most; images and steps of each.
LOOKS, MOST, STEPS = 10, 64, 5
USUAL = "linf:8/255"


def usual_threat(data: str) -> ThreatModel:
    """Return the threat of the look: the data's own, if it has one."""
    entry = CATALOG.get(DataString.parse(data).name)
    return ThreatModel.parse(USUAL if entry is None or entry.threat is None else entry.threat)


def oracles(scores: Sequence[Tensor], labels: Labels) -> dict[str, float]:
    """Return the accuracy of oracles over members' scores (N K each): the best one, any that is right, all."""
    right = torch.stack([one.argmax(1) == labels for one in scores])
    return {
        "best_member": float(right.float().mean(1).max()),
        "any_right": float(right.any(0).float().mean()),
        "all_right": float(right.all(0).float().mean()),
    }


def quick_diversity(
    nets: Sequence[nn.Module], test: ImageSet, trained_on: int, threat: ThreatModel
) -> dict[str, float]:
    """Return shares of images fooled, and the mean cosine of members' gradients.

    `transfer` is between members; `white_box` of their mean by an attack on it. So few images are looked at that
    ten looks of a run of forty epochs take 5 to 6 % of plain training.
    """
    count = min(MOST, max(trained_on // 50, 8), len(test))
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
    """Return the mean share fooled, over pairs of members, of images that the second has right; 0 for none."""
    with torch.no_grad():
        right = [net(x).argmax(1) == labels for net in nets]
    hits = tries = torch.zeros((), device=x.device)
    for number, net in enumerate(nets):

        def value(at: Images, net: nn.Module = net) -> Tensor:
            return F.cross_entropy(net(at), labels, reduction="none")

        made = ensemble_utils.ascend(value, start, x, threat, steps=STEPS, step_size=0.4)
        with torch.no_grad():
            for other in range(len(nets)):
                if other != number:
                    hits = hits + (right[other] & (nets[other](made).argmax(1) != labels)).sum()
                    tries = tries + right[other].sum()
    return float(hits / tries.clamp(min=1))


def _white_box(nets: Sequence[nn.Module], start: Images, x: Images, labels: Labels, threat: ThreatModel) -> float:
    """Return the share fooled of images that the members' mean probabilities have right; 0 for none."""

    def said(at: Images) -> Tensor:
        return ensemble_utils.mixed(torch.stack([net(at) for net in nets]))

    def value(at: Images) -> Tensor:
        return F.nll_loss(said(at), labels, reduction="none")

    made = ensemble_utils.ascend(value, start, x, threat, steps=STEPS, step_size=0.4)
    with torch.no_grad():
        right = said(x).argmax(1) == labels
        hits = right & (said(made).argmax(1) != labels)
    return float(hits.sum() / right.sum().clamp(min=1))


def _cosine(nets: Sequence[nn.Module], x: Images, labels: Labels) -> float:
    _, slopes = ensemble_utils.sloped(nets, x, labels)
    return float(ensemble_utils.cosines(slopes.detach()).mean())
