"""Diagnoses of the model's output: probabilities, signs, saturation, number of classes."""

from __future__ import annotations

from collections.abc import Callable

from robustkit.checks import lints
from robustkit.checks.probe import Probe
from robustkit.checks.repeated_calls import NOISE
from robustkit.core.flags import Flag, passed, unmeasured
from robustkit.core.shapes import Logits, Mask

ROUNDING = 1e-5
MAX_SATURATED_SHARE = 0.75  # ordinary overfitted nets saturate on up to half of the images
FLOAT16_LARGEST = 65504.0
# A share this close to its limit is measured on more images.
UNDECIDED = 0.2


def probabilities(probe: Probe) -> Flag | None:
    """Rows that are non-negative and sum to 1."""
    logits = probe.logits
    if logits.min() < -ROUNDING or (logits.sum(1) - 1).abs().max() > ROUNDING:
        return None
    return Flag(
        "probabilities",
        "warning",
        len(logits),
        "rows of outputs are non-negative and sum to 1: probabilities, whose gradients vanish if one is near 1",
        "let the model return logits",
    )


def never_positive(probe: Probe) -> Flag | None:
    """Outputs that are all at most 0: log-probabilities, or scores minus their maximum."""
    if probe.logits.max() > 0:
        return None
    return Flag(
        "non-positive-outputs",
        "info",
        round(float(probe.logits.max()), 6),
        "is the largest output: none is above 0 (log-probabilities, or scores minus their maximum), so a margin "
        "loss that masks the label with 0 instead of minus infinity has no gradient",
        "nothing to do for robustkit's own losses; do not trust other tools' results on this model",
    )


def saturated(probe: Probe) -> Flag | None:
    """Rows where cross-entropy has no gradient because softmax is exactly 1 in float32."""
    certain = _saturated(decisive_logits(probe, _saturated_share, MAX_SATURATED_SHARE))
    if certain.float().mean() <= MAX_SATURATED_SHARE:
        return None
    return Flag(
        "saturated-softmax",
        "warning",
        int(certain.sum()),
        f"of {len(certain)} images have softmax exactly 1 in float32: cross-entropy has no gradient there",
        "use attacks with a margin or dlr loss",
    )


def too_large_for_half(probe: Probe) -> Flag | None:
    """Logits that float16 cannot represent."""
    largest = float(probe.logits.abs().max())
    if largest <= FLOAT16_LARGEST:
        return None
    return Flag(
        "float16-overflow",
        "warning",
        round(largest, 1),
        "is the largest logit: above 65,504 float16 turns it into infinity",
        "search in fp32 or bf16, not fp16",
    )


def dlr_flat(probe: Probe) -> Flag | None:
    """Rows whose first and third logits are almost equal."""
    share = lints.dlr_flatness(decisive_logits(probe, lints.dlr_flatness, lints.YELLOW))
    if share <= lints.YELLOW:
        return None
    return Flag(
        "dlr-flat",
        "warning",
        round(share, 4),
        "is the share of images whose first and third logits are almost equal: the dlr loss divides by the "
        "gap between them",
        "use attacks with a margin loss",
    )


def underflow(probe: Probe) -> Flag | None:
    """Rows in which several classes, not all, share one lower bound."""
    share = lints.underflow(decisive_logits(probe, lints.underflow, lints.YELLOW))
    if share <= lints.YELLOW:
        return None
    return Flag(
        "underflow",
        "warning",
        round(share, 4),
        "is the share of images with several classes at exactly the same lowest output: a lower bound, as of "
        "log(clamp(p)), where no loss has a slope",
        "let the model return its values before the lower bound",
    )


def few_classes(probe: Probe) -> Flag | None:
    """Fewer classes than the targeted attacks of the run have targets."""
    classes = probe.logits.shape[1]
    wanted = max((getattr(attack, "targets", 0) or 0 for attack in probe.attacks), default=0)
    if wanted <= classes - 1:
        return None
    return Flag(
        "few-classes",
        "info",
        classes,
        f"classes: attacks that would aim at {wanted} other ones aim at {classes - 1}",
        "nothing to do: that is every other class there is",
    )


def dim_images(probe: Probe) -> Flag | None:
    """Images that look divided by 255 once too often."""
    largest = float(probe.x.max())
    if largest > 2 / 255:
        return None
    return Flag(
        "dim-images",
        "warning",
        round(largest, 6),
        "is the largest pixel value: images on [0, 1] that were divided by 255 again look like this",
        "give images on [0, 1]; robustkit does no scaling of floats",
    )


def batch_dependent(probe: Probe) -> Flag:
    """Logits of an image that change by more than float noise when it is evaluated alone."""
    alone, _ = probe.alone
    scale = probe.logits[:1].abs().max().clamp(min=1e-12)
    gap = float((alone - probe.logits[:1]).abs().max() / scale)
    what = "is the relative change of an image's logits when it is evaluated alone"
    if gap <= NOISE:
        return passed("batch-dependent", round(gap, 6), what)
    if not probe.deterministic:  # random models have another diagnosis
        return unmeasured("batch-dependent", "the model is random, which hides it", "see its draws")
    return Flag(
        "batch-dependent",
        "warning",
        round(gap, 6),
        f"{what}: they depend on the other images in the batch (batch norm in training mode?), so no verdict is "
        f"about one image",
        "put the model into eval mode",
    )


def decisive_logits(probe: Probe, share: Callable[[Logits], float], limit: float) -> Logits:
    """Return the logits of the first images, or of all if a share of the first is too close to its limit."""
    return probe.all_logits if abs(share(probe.logits) - limit) < UNDECIDED else probe.logits


def _saturated(logits: Logits) -> Mask:
    return logits.float().softmax(1).amax(1) == 1


def _saturated_share(logits: Logits) -> float:
    return float(_saturated(logits).float().mean())
