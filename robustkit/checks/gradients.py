"""Diagnoses of the input gradient: missing, zero, vanishing, or not that of the function."""

from __future__ import annotations

import torch

from robustkit.attack_api import query
from robustkit.checks import lints, slopes
from robustkit.checks.nearby import MAX_SMALL_ERROR
from robustkit.checks.outputs import decisive_logits, probabilities
from robustkit.checks.probe import REPEATS, Probe
from robustkit.checks.repeated_calls import agree, seed_generators
from robustkit.core.criteria import Goal
from robustkit.core.flags import Flag, passed, unmeasured
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images, Labels, Logits, Mask, PerRow

VANISHING = 1e-7
MAX_VANISHED_SHARE = 0.75
# The least number of points at which a gradient is compared with finite differences.
POINTS = 8
# The images at which the gradient is computed twice.
ROWS_REPEATED = 4
# The rounding error of a net's own arithmetic, in roundings of the largest logit.
ROUNDING = 4


def broken(probe: Probe) -> Flag | None:
    """Images with a pixel whose gradient is infinite or NaN."""
    sound = probe.raw_gradients.flatten(1).isfinite().all(1)
    labels = probe.labels[probe.correct_rows]
    for gradient in _loss_gradients(probe.logits[probe.correct_rows], labels):
        sound &= gradient.isfinite().all(1)
    if sound.all():
        return None
    return Flag(
        "broken-gradient",
        "warning",
        int((~sound).sum()),
        f"of {len(sound)} images have pixels whose gradient is infinite or NaN (a root, a logarithm or a "
        f"division at 0): robustkit's attacks use 0 instead, others fail",
        "do not trust other tools' results on this model; compare attacks with smoothed gradients and "
        "score-based attacks",
    )


def zero(probe: Probe) -> Flag:
    """I1: images at which the margin's gradient is exactly zero."""
    code, gone = "zero-gradient", _sizes(probe) == 0
    if not len(gone):
        return unmeasured(
            code, "the model misclassifies all of the first images", "pass images that it classifies correctly"
        )
    what = f"of {len(gone)} images have an input gradient of exactly zero"
    if not gone.any():
        return passed(code, 0, what)
    return Flag(
        code,
        "warning",
        int(gone.sum()),
        f"{what}: gradient attacks cannot change them",
        "use score-based attacks (--suite square), or a differentiable version of the model",
    )


def vanishing(probe: Probe) -> Flag | None:
    """Images at which cross-entropy's gradient is tiny beside the margin's.

    Both go backward through the same layers, so those in the logits are compared.
    """

    def share(logits: Logits) -> float:
        return float(_vanished(probe, logits).float().mean())

    gone = _vanished(probe, decisive_logits(probe, share, MAX_VANISHED_SHARE))
    zeros = (_sizes(probe) == 0).float().mean()
    if not len(gone) or gone.float().mean() - zeros <= MAX_VANISHED_SHARE:
        return None
    return Flag(
        "vanishing-gradient",
        "warning",
        int(gone.sum()),
        f"of {len(gone)} images have a cross-entropy gradient below 1e-7 of the margin's: the probabilities are "
        f"so close to 0 and 1 that cross-entropy attacks make no progress",
        "use attacks with a margin or dlr loss; check for a temperature or a softmax inside the model",
    )


def disagrees(probe: Probe) -> Flag:
    """A gradient that is not that of the function, by finite differences at points close to the images.

    Two kinds of direction are compared (see `slopes`): the gradient's signs, along which attacks move and where
    float rounding is smallest, and random signs, which also show a part of the gradient that is missing. If there
    are few images, each is used several times, at other points. Random models are called with the same seeds each
    time. Not measured for probabilities, whose slope is 0 if the model is certain, nor for models whose draws no
    seed repeats: those have other flags.
    """
    code, rows = "wrong-gradient", probe.correct_rows[_sizes(probe) > 0]
    if not len(rows) or probabilities(probe):
        return unmeasured(
            code, "there is no slope to compare: zero gradients, or probabilities", "see their flags"
        )
    what = "is the median relative error of the gradient against finite differences"
    if len(rows) == len(probe.correct_rows) and probe.nearby.slope_error <= MAX_SMALL_ERROR:
        return passed(code, round(probe.nearby.slope_error, 4), what)
    rows = rows.repeat(-(-POINTS // len(rows)))
    copies = torch.arange(len(rows), device=rows.device)
    rng, goal = RowRng(probe.seed, "slopes", copies), Goal(probe.labels[rows])
    x = slopes.nearby(probe.x[rows], rng.at(step=1))
    there = probe.seeded_query(x, goal)
    rounding = ROUNDING * _precision(there.logits) * float(there.logits.abs().amax(1).median())

    def loss(images: Images) -> PerRow:
        return probe.seeded_query(images, goal, with_gradient=False).loss

    flat = there.gradient.flatten(1)
    kinds = ((there.gradient.sign(), flat.abs().sum(1)), (slopes.signs(x, rng.at(step=2)), flat.norm(dim=1)))
    comparisons = [slopes.compare(loss, x, there.gradient, direction, size, rounding) for direction, size in kinds]
    worst = round(max(one.error for one in comparisons), 4)
    if any(one.state == "wrong" for one in comparisons):
        one, other = (probe.seeded_query(x, goal, with_gradient=False).logits for _ in range(2))
        if not agree(one, other):
            return unmeasured(
                code, "no seed repeats the model's draws, so there is nothing to compare", "see its draws"
            )
        return Flag(
            code,
            "warning",
            worst,
            f"{what}, which should be near 0: it is "
            "not that of the function (quantisation, a straight-through estimate, shattered gradients)",
            "attack a smooth version of the model and judge on this one; compare score-based attacks",
        )
    if not any(one.state == "right" for one in comparisons):
        return unmeasured(
            code,
            "finite differences at several step sizes do not agree with each other, by float rounding or kinks",
            "compare score-based attacks",
        )
    return passed(code, worst, what)


def unlike(probe: Probe) -> Flag | None:
    """Gradients that differ at the same point though logits do not: random numbers in the backward pass."""
    rows = probe.correct_rows[:ROWS_REPEATED]
    if not len(rows) or not probe.deterministic:
        return None
    seed_generators(REPEATS + 1)
    again = query(probe.model, probe.x[rows], Goal(probe.labels[rows]), "margin").gradient
    value = lints.gradient_disagreement(probe.gradients[: len(rows)], again)
    if value <= lints.YELLOW:
        return None
    return Flag(
        "unlike-gradients",
        "warning",
        round(value, 4),
        "is 1 minus the cosine of two gradients at the same point, although the logits are equal: the backward "
        "pass is random",
        "average gradients over draws, and compare score-based attacks",
    )


def _vanished(probe: Probe, logits: Logits) -> Mask:
    """Return at which of the correct images with these logits cross-entropy's gradient is tiny."""
    labels = probe.labels[: len(logits)]
    right = logits.argmax(1) == labels
    ce, margin = (gradient.abs().amax(1) for gradient in _loss_gradients(logits[right], labels[right]))
    return ce < VANISHING * margin


def _loss_gradients(logits: Logits, labels: Labels) -> list[Logits]:
    """Return the gradients of cross-entropy and of the margin in logits (B K)."""
    goal = Goal(labels)
    with torch.enable_grad():
        logits = logits.detach().requires_grad_()
        return [torch.autograd.grad(goal.loss(logits, loss).sum(), logits)[0] for loss in ("ce", "margin")]


def _precision(logits: Logits) -> float:
    """Return the relative rounding of the type that logits were computed in, as their digits show."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if bool((logits == logits.to(dtype)).all()):
            return torch.finfo(dtype).eps
    return torch.finfo(logits.dtype).eps


def _sizes(probe: Probe) -> PerRow:
    """Return the largest entry of the margin's gradient at each correct image."""
    return probe.gradients.flatten(1).abs().amax(1)
