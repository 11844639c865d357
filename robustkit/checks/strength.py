"""Diagnoses of an attack's strength: no eps is enough, or more steps fool more images."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace
from fractions import Fraction

import torch

from robustkit.checks.pgd_runs import MIN_GAINED
from robustkit.checks.probe import MAX_ROWS_SEVERAL, Probe
from robustkit.core.flags import Flag, passed, unmeasured
from robustkit.core.threat import ThreatModel
from robustkit.runs.report_parts import Stage

SQUARE_GAIN = 0.002
# If attacks on views of a model fool this share of the images more, its own gradients are not reliable.
VIEW_GAIN = 0.02


def robust_at_any_eps(probe: Probe) -> Flag:
    """I6: images that PGD does not fool although every image is allowed, if they are more than chance.

    If PGD fools all of the first images, and no other check found a sign of a mask, the others are left out.
    """
    code = "survives-any-eps"
    if not len(probe.correct_rows):
        return unmeasured(
            code, "the model misclassifies all of the first images", "pass images that it classifies correctly"
        )
    threat, rows = _unlimited_threat(probe), probe.correct_rows[:MAX_ROWS_SEVERAL]
    left = probe.robust_under(threat, rows, steps=40)
    others = probe.correct_rows[MAX_ROWS_SEVERAL:]
    if len(others) and (len(left) or probe.suspicious):
        left, rows = torch.cat([left, probe.robust_under(threat, others, steps=40)]), probe.correct_rows
    chance = 1 / probe.logits.shape[1]
    what = f"of {len(rows)} images are robust to gradient attacks without a limit of distance"
    if len(left) <= chance * len(rows):
        return passed(code, len(left), what)
    return Flag(
        code,
        "warning",
        len(left),
        f"{what}: the gradients are masked",
        "use a differentiable version of the model, and score-based attacks",
    )


def unconverged(probe: Probe) -> Flag:
    """Images that only the second half of PGD's steps fools; not measured on random models."""
    code = "not-converged"
    if not len(probe.correct_rows):
        return unmeasured(
            code, "the model misclassifies all of the first images", "pass images that it classifies correctly"
        )
    if not probe.deterministic:
        return unmeasured(code, "on a random model more steps also mean more random draws", "look at its draws")
    runs = probe.pgd_runs
    gained = runs.gained
    what = f"of {runs.tested} images are fooled by {runs.steps} steps of PGD but not by {runs.steps // 2}"
    if gained < MIN_GAINED or gained <= 0.1 * runs.tested:
        return passed(code, gained, what)
    return Flag(
        code,
        "warning",
        gained,
        f"{what}: attacks need more steps",
        "use more steps and restarts, e.g. --suite 'rapid,pgd(steps=200,restarts=5)'",
    )


def scores_beat_gradients(stages: Sequence[Stage], access: Sequence[str]) -> Flag:
    """Return a flag if a score-based stage fooled images that no earlier gradient stage had fooled.

    `access` is what each stage's attack needs. The threshold is AutoAttack's, .2 points of accuracy, and more than
    one image: any attack may fool one image near the boundary.
    """
    code, score_stages = "score-beats-gradient", []
    for number, stage in enumerate(stages):
        if access[number] == "score" and "gradient" in access[:number] and stage.forwards:
            score_stages.append(stage)
            if stage.fooled > max(1, SQUARE_GAIN * stage.robust_accuracy.n):
                return Flag(
                    code,
                    "warning",
                    stage.fooled,
                    f"images that no gradient attack had fooled were fooled by the score-based {stage.attack}: "
                    "the gradient attacks were too weak, or the gradients are masked",
                    "run stronger gradient attacks and square with more queries; try an adaptive attack",
                )
    if not score_stages:
        return unmeasured(
            code,
            "no score-based attack was run after a gradient attack: the suite has none, no image was left for "
            "it, or the model is random, where the score of one draw is chance",
            "add one if the suite has none: --suite 'rapid,...'",
        )
    fooled = sum(stage.fooled for stage in score_stages)
    return passed(code, fooled, "is how many images no gradient attack and then a score-based one fooled")


def masked(
    stages: Sequence[Stage],
    access: Sequence[str],
    views: Sequence[str],
    places: Sequence[str],
    plain: bool = False,
) -> Flag:
    """Return a flag if attacks on views of the model fooled images that attacks on its own gradients had not.

    `access` says of each stage what its attack needs, `views` the view that it used, empty for the model itself;
    `places` are suspected places, in words; `plain` is whether none was found. Any attack may fool one more image,
    or one in fifty.
    """
    code, own, on_views = "masked-gradient", False, []
    for stage, needs, view in zip(stages, access, views, strict=True):
        if view and stage.forwards:
            on_views.append(stage)
        own = own or (needs == "gradient" and not view and not on_views)
    if not on_views and plain:
        return passed(
            code, 0, "places that stop or change gradients were found, so there was no substitute to attack"
        )
    if not on_views:
        return unmeasured(
            code, "no substitute for the model's gradients was attacked", "--suite adaptive does so in any case"
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
        return passed(code, total, "is how many images only attacks on views of the model fooled")
    best = max(fooled, key=lambda name: fooled[name])
    why = f"; {', '.join(places)}" if places else ""
    return Flag(
        code,
        "warning",
        total,
        "images that no attack on the model's own gradients had fooled were fooled by attacks on views of it, "
        f"most by {best}: the gradients are masked{why}",
        "use this number; that of AutoAttack, or of any attack on the model alone, may be too high",
    )


def unattacked(views: Sequence[str], there: Container[str], robust: int) -> Flag | None:
    """Return a flag if every attack of a suite needs a view that the model does not have.

    `views` is the view that each attack uses, empty for the model itself; `there` are the model's views.
    """
    if not robust or not all(view and view not in there for view in views):
        return None
    return Flag(
        "not-attacked",
        "warning",
        robust,
        "images are robust because no attack ran: the model has no "
        f"{' and no '.join(dict.fromkeys(views))} to attack",
        "remove the @ and what follows it from the suite, or use --suite auto, which uses the model's views",
    )


def _unlimited_threat(probe: Probe) -> ThreatModel:
    """The threat of the same norm that allows every image."""
    return replace(probe.threat, eps=Fraction(probe.threat.diameter(tuple(probe.x.shape[1:]))))
