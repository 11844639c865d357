"""Diagnoses by indicators of attack failure, and by planted adversarials that the run's attack must find.

The indicators are computed on PGD runs on images that PGD finds hard. Two more have diagnoses of their own: I1 is
`zero-gradient`, I6 is `survives-any-eps`. I5 cannot occur: every success is judged on the model itself. The
planted points are for the run's own attack, with its parameters; see `binarization`.
"""

from __future__ import annotations

import torch

from robustkit.checks import indicators
from robustkit.checks.binarization import binarization
from robustkit.checks.nearby import MAX_SMALL_CHANGE
from robustkit.checks.probe import Probe
from robustkit.core.criteria import Goal
from robustkit.core.errors import UsageError
from robustkit.core.flags import Flag, passed, unmeasured
from robustkit.core.rng import RowRng

# The mean relative change of the margin above which it is flagged, and the number of draws; plain nets have a
# quarter of it at most.
UNSTABLE, DRAWS = 0.5, 12
INNER = 3
NO_ATTACK = "the run has no row-wise attack with one gradient and one start to test"
NO_CORRECT_IMAGE = "the model misclassifies all of the first images"
ADD_ONE = "add one: --suite 'rapid,...'"


def unstable(probe: Probe) -> Flag:
    """I2: a margin that changes if the image changes invisibly."""
    code, rows = "unstable-loss", probe.first_correct_rows
    if not len(rows):
        return unmeasured(code, NO_CORRECT_IMAGE, "pass images that it classifies correctly")
    value = round(probe.nearby.mean_change, 4)
    what = "is the mean relative change of the margin if pixels change by at most 4/255"
    if value <= MAX_SMALL_CHANGE and probe.deterministic:
        return passed(code, value, what)
    x, points = probe.x[rows], indicators.nearby(probe.x[rows], RowRng(probe.seed, "nearby", rows), draws=DRAWS)
    with torch.no_grad():
        logits = [probe.model(images.clamp(0, 1)) for images in (*points, x)]
        margins = Goal(probe.labels[rows].repeat(len(logits))).loss(torch.cat(logits), "margin").view(-1, len(x))
    value = round(float(indicators.unstable(margins[-1], margins[:-1]).mean()), 4)
    if value <= UNSTABLE:
        return passed(code, value, what)
    return Flag(
        code,
        "warning",
        value,
        f"{what}: the gradient changes from point to point (noise inside, or a shattered function)",
        "average gradients over nearby points: --suite adaptive does so",
    )


def silent(probe: Probe) -> Flag:
    """I3: attacks with a success before the last point but not at it; they count, so it is never a flag."""
    code = "silent-success"
    runs = probe.pgd_runs if probe.deterministic else None
    if runs is None or runs.fooled is None:
        return _without_runs(probe, code)
    found = indicators.silent(runs.fooled)
    return passed(
        code,
        int(found.sum()),
        f"of {len(found)} attacks of {runs.steps} steps fooled the model before but not at their last point; "
        "every query is judged, so these count",
    )


def incomplete(probe: Probe) -> Flag:
    """I4: attacks that failed while their loss still rose; not measured on random models."""
    code = "incomplete-optimisation"
    runs = probe.pgd_runs if probe.deterministic else None
    if runs is None or runs.fooled is None:
        return _without_runs(probe, code)
    rising = runs.still_rising
    what = f"of {runs.failed} attacks that failed in {runs.steps} steps gained {runs.late}"
    if rising < 3 or 2 * rising <= runs.failed:
        return passed(code, rising, what)
    return Flag(
        code,
        "warning",
        rising,
        f"{what}: they were stopped too early",
        "use more steps and restarts, e.g. --suite 'rapid,pgd(steps=200,restarts=5)'",
    )


def finds_planted_points(probe: Probe) -> Flag:
    """Adversarials planted in the model's own features, which the run's attack must find."""
    code, attack, rows = "attack-not-alive", probe.strongest, probe.first_correct_rows
    if attack is None:
        return unmeasured(code, NO_ATTACK, ADD_ONE)
    if not len(rows):
        return unmeasured(code, NO_CORRECT_IMAGE, "pass images that it classifies correctly")
    if probe.net is None or not probe.threat.eps:
        return unmeasured(code, "points cannot be planted without readable layers, or at eps 0", "nothing to do")
    if probe.threat.norm == "l1":
        return unmeasured(
            code, "in l1 no attack finds all planted points, which change every pixel", "go by the other checks"
        )
    if not probe.deterministic:
        return unmeasured(
            code,
            "the model is random, so that planted points are not certain",
            "trust its draws, and --suite adaptive, which averages gradients",
        )
    rng = RowRng(probe.seed, "planted", rows)
    try:
        found = binarization(probe.model, probe.net, probe.x[rows], attack, probe.threat, rng=rng, inner=INNER)
    except UsageError as error:
        return unmeasured(code, str(error).rstrip("."), "go by the other checks")
    hits, name = round(found.rate * found.n), attack.info.name
    what = (
        f"of {found.n} adversarials planted in the model's own features were found by {name} as this run sets it"
    )
    if found.verdict == "pass":
        return passed(code, hits, f"{what}, {round(found.control * found.n)} by as many random points")
    if found.verdict == "too easy":
        return unmeasured(
            code,
            f"{hits} {what}, but {round(found.control * found.n)} by as many random points: too easy to be a test",
            "go by the other checks",
        )
    return Flag(
        code,
        "warning",
        hits,
        f"{what}: images that it does not fool may still have adversarial images",
        "use a stronger suite (--suite auto or adaptive), or give a differentiable version of the model",
    )


def _without_runs(probe: Probe, code: str) -> Flag:
    """Return a flag that says why there are no runs of PGD to measure."""
    if not len(probe.correct_rows):
        return unmeasured(code, NO_CORRECT_IMAGE, "pass images that it classifies correctly")
    if not probe.deterministic:
        return unmeasured(code, "the loss of a random model changes from draw to draw", "look at its draws")
    steps = probe.pgd_runs.steps // 2
    return passed(code, 0, f"attacks failed: every image tested was fooled within {steps} steps")
