"""Diagnoses of how an attack fares: no eps is enough, or more steps find more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import torch

from robustkit.checks.outputs import agree
from robustkit.checks.probe import Probe
from robustkit.record import Flag, Stage
from robustkit.threat import ThreatModel

SQUARE_GAIN = 0.002
# Where views of a model fool so many more of the images, its own gradients are no good guide.
VIEW_GAIN = 0.02


def survives_everything(probe: Probe) -> Flag | None:
    """Images that PGD leaves standing although every image is allowed."""
    left = probe.left_by(_everything(probe), probe.few, steps=40, step_size=0.1)
    chance = 1 / probe.logits.shape[1]
    if len(left) <= chance * max(len(probe.few), 1):
        return None
    return Flag(
        "survives-any-eps",
        "warning",
        len(left),
        f"of {len(probe.few)} images stand against gradient attacks that may turn them into any other image: "
        "the gradients are masked",
        "give a differentiable version of the model, and judge by score-based attacks",
    )


def unconverged(probe: Probe) -> Flag | None:
    """Images that fall to 40 steps of PGD but not to 20. Of a random model it would tell but of its draws."""
    left = probe.left_by(probe.threat, probe.few, steps=20)
    more = probe.left_by(probe.threat, left, steps=40)
    gained = len(left) - len(more)
    if gained < 3 or gained <= 0.1 * len(probe.few):
        return None
    with torch.no_grad():
        one, other = (probe.model(probe.x[left]) for _ in range(2))
    if not agree(one, other):
        return None
    return Flag(
        "not-converged",
        "warning",
        gained,
        f"of {len(probe.few)} images fall to 40 steps of PGD but not to 20: attacks have far to go here",
        "use more steps and restarts, e.g. --suite 'rapid,pgd(steps=200,restarts=5)'",
    )


def scores_beat_gradients(stages: Sequence[Stage], access: Sequence[str]) -> list[Flag]:
    """Return a flag if a score-based stage fooled images that every gradient stage before it had left.

    `access` says of each stage what its attack needs. AutoAttack's threshold: .2 points of accuracy.
    """
    for number, stage in enumerate(stages):
        if access[number] == "score" and "gradient" in access[:number]:
            gain = stage.fooled / stage.robust_accuracy.n
            if gain > SQUARE_GAIN:
                return [
                    Flag(
                        "score-beats-gradient",
                        "warning",
                        stage.fooled,
                        f"images that every gradient attack had left fell to the score-based {stage.attack}: "
                        "those were too weak, or the gradients are masked",
                        "run stronger gradient attacks and square with more queries; try an adaptive attack",
                    )
                ]
    return []


def masked(stages: Sequence[Stage], views: Sequence[str], places: Sequence[str]) -> list[Flag]:
    """Return a flag if attacks on views of the model fooled images that its own gradients had left.

    `views` says of each stage what it climbed on, if not the model itself; `places` are suspects, in words. One
    image, or one in fifty, may as well fall to another attack of any kind.
    """
    fooled = {stage.attack: stage.fooled for stage, view in zip(stages, views, strict=True) if view}
    total = sum(fooled.values())
    if total <= max(1, VIEW_GAIN * stages[0].robust_accuracy.n):
        return []
    best = max(fooled, key=lambda name: fooled[name])
    why = f"; {', '.join(places)}" if places else ""
    return [
        Flag(
            "masked-gradient",
            "warning",
            total,
            "images that every attack on the model's own gradients had left fell to attacks on views of it, most "
            f"to {best}: the gradients are masked{why}",
            "quote this number; that of AutoAttack, or of any attack on the model alone, is too high",
        )
    ]


def _everything(probe: Probe) -> ThreatModel:
    """The threat of the same norm that allows every image."""
    return replace(probe.threat, eps=Fraction(probe.threat.diameter(tuple(probe.x.shape[1:]))))
