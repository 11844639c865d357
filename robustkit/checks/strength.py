"""Diagnoses of how an attack fares: no eps is enough, or more steps find more."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace
from fractions import Fraction

from robustkit.checks.probe import Probe
from robustkit.core.flags import Flag, passed, unmeasured
from robustkit.core.threat import ThreatModel
from robustkit.runs.evaluation_record import Stage

SQUARE_GAIN = 0.002
# Where views of a model fool so many more of the images, its own gradients are no good guide.
VIEW_GAIN = 0.02


def survives_everything(probe: Probe) -> Flag:
    """I6: images that PGD leaves standing although every image is allowed; as many as chance has are no sign."""
    code = "survives-any-eps"
    if not len(probe.few):
        return unmeasured(code, "the model is right on none of the first images", "give images that it knows")
    left = probe.left_by(_everything(probe), probe.few, steps=40)
    chance = 1 / probe.logits.shape[1]
    what = f"of {len(probe.few)} images stand against gradient attacks that may turn them into any other image"
    if len(left) <= chance * len(probe.few):
        return passed(code, len(left), what)
    return Flag(
        code,
        "warning",
        len(left),
        f"{what}: the gradients are masked",
        "give a differentiable version of the model, and judge by score-based attacks",
    )


def unconverged(probe: Probe) -> Flag:
    """Images that fall to 40 steps of PGD but not to 20. Of a random model it would tell but of its draws."""
    code = "not-converged"
    if not len(probe.few):
        return unmeasured(code, "the model is right on none of the first images", "give images that it knows")
    if not probe.steady:
        return unmeasured(code, "on a random model more steps are more draws to be lucky in", "look at its draws")
    gained = int(probe.trail.fooled.any(1).sum()) if len(probe.left) else 0
    what = f"of {len(probe.few)} images fall to 40 steps of PGD but not to 20"
    if gained < 3 or gained <= 0.1 * len(probe.few):
        return passed(code, gained, what)
    return Flag(
        code,
        "warning",
        gained,
        f"{what}: attacks have far to go here",
        "use more steps and restarts, e.g. --suite 'rapid,pgd(steps=200,restarts=5)'",
    )


def scores_beat_gradients(stages: Sequence[Stage], access: Sequence[str]) -> Flag:
    """Return whether a score-based stage fooled images that every gradient stage before it had left.

    `access` says of each stage what its attack needs. AutoAttack's threshold, .2 points of accuracy, and more than
    one image: one at the boundary may as well fall to an attack of any kind.
    """
    code, asked = "score-beats-gradient", []
    for number, stage in enumerate(stages):
        if access[number] == "score" and "gradient" in access[:number] and stage.forwards:
            asked.append(stage)
            if stage.fooled > max(1, SQUARE_GAIN * stage.robust_accuracy.n):
                return Flag(
                    code,
                    "warning",
                    stage.fooled,
                    f"images that every gradient attack had left fell to the score-based {stage.attack}: "
                    "those were too weak, or the gradients are masked",
                    "run stronger gradient attacks and square with more queries; try an adaptive attack",
                )
    if not asked:
        return unmeasured(
            code,
            "no score-based attack was run after a gradient one: there is none, nothing was left for it, or the "
            "model is random, where the score of one draw is luck",
            "add one if the suite has none: --suite 'rapid,...'",
        )
    fooled = sum(stage.fooled for stage in asked)
    return passed(code, fooled, "images that every gradient attack had left fell to score-based ones")


def masked(
    stages: Sequence[Stage],
    access: Sequence[str],
    views: Sequence[str],
    places: Sequence[str],
    plain: bool = False,
) -> Flag:
    """Return whether attacks on views of the model fooled images that its own gradients had left.

    `access` says of each stage what its attack needs, `views` what it climbed on, if not the model itself;
    `places` are suspects, in words; `plain` is whether views were looked for in vain. One image, or one in fifty,
    may as well fall to another attack of any kind.
    """
    code, own, on_views = "masked-gradient", False, []
    for stage, needs, view in zip(stages, access, views, strict=True):
        if view and stage.forwards:
            on_views.append(stage)
        own = own or (needs == "gradient" and not view and not on_views)
    if not on_views and plain:
        return passed(code, 0, "places that stop or bend gradients were seen, so there was no stand-in to attack")
    if not on_views:
        return unmeasured(
            code, "no stand-in for the model's gradients was attacked", "--suite adaptive does so in any case"
        )
    if not own:
        return unmeasured(
            code,
            "no attack on the model's own gradients came before those on views of it, to compare with",
            "put one first: --suite 'rapid,...'",
        )
    fooled = {stage.attack: stage.fooled for stage in on_views}
    total = sum(fooled.values())
    if total <= max(1, VIEW_GAIN * stages[0].robust_accuracy.n):
        return passed(code, total, "images that the model's own gradients had left fell to attacks on views of it")
    best = max(fooled, key=lambda name: fooled[name])
    why = f"; {', '.join(places)}" if places else ""
    return Flag(
        code,
        "warning",
        total,
        "images that every attack on the model's own gradients had left fell to attacks on views of it, most "
        f"to {best}: the gradients are masked{why}",
        "quote this number; that of AutoAttack, or of any attack on the model alone, is too high",
    )


def unattacked(views: Sequence[str], there: Container[str], standing: int) -> Flag | None:
    """Return a flag if every attack of a suite climbs a view that the model has not, and images stand for that.

    `views` says of each attack what it climbs, if not the model itself; `there` are the views that there are.
    """
    if not standing or not all(view and view not in there for view in views):
        return None
    return Flag(
        "not-attacked",
        "warning",
        standing,
        f"images stand because nothing attacked them: the model has no {' and no '.join(dict.fromkeys(views))} to "
        "climb on",
        "leave the @ and what follows it out of the suite, or write --suite auto, which takes what there is",
    )


def _everything(probe: Probe) -> ThreatModel:
    """The threat of the same norm that allows every image."""
    return replace(probe.threat, eps=Fraction(probe.threat.diameter(tuple(probe.x.shape[1:]))))
