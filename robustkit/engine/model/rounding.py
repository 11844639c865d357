"""The rounding of a search in low precision, measured on the model: its logits against those in float32."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from robustkit.core import criteria
from robustkit.core.isolation import own_randomness
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images, Logits
from robustkit.core.threat import ThreatModel
from robustkit.engine.model.instrumented_model import ExecutionConfig, InstrumentedModel

# The bound on rounding is this multiple of the largest one that was measured on few images. On six CIFAR-10
# ResNets the largest of 1,024 points was 1.3 to 1.9 times that of 16 images (3.0 for the worst choice of images).
SAFETY_FACTOR = 2.0
# Low precision cannot help a search if it moves margins by more than this share of the median clean margin.
MAX_MARGIN_SHARE = 0.25


def measured_rounding(
    model: InstrumentedModel, config: ExecutionConfig, x: Images, threat: ThreatModel | None
) -> tuple[float, bool]:
    """Return a bound on the rounding error of margins, and whether low precision can help; uncounted.

    Args:
        model: the model; it is compared with itself in float32.
        config: in low precision.
        x: clean images (B C H W). Random points of the threat and points along the gradient are compared, too.
        threat: the perturbations; None for clean images only.

    Returns:
        The bound, as a share of the largest logit, and whether the error that was measured is small against the
        median clean margin.
    """
    largest, clean_margin = 0.0, None
    for points in _points(model, config, x, threat):
        expected = _logits(model, ExecutionConfig(model.model), points)
        error = _logits(model, config, points) - expected
        scale = expected.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny)
        # The error of a difference of two logits.
        largest = max(largest, float(((error.amax(1) - error.amin(1)) / scale).max()))
        if clean_margin is None:
            top = expected.topk(2).values
            clean_margin = float(((top[:, 0] - top[:, 1]) / scale).median())
    return SAFETY_FACTOR * largest, largest <= MAX_MARGIN_SHARE * (clean_margin or 0.0)


def _points(
    model: InstrumentedModel, config: ExecutionConfig, x: Images, threat: ThreatModel | None
) -> Iterator[Images]:
    """Yield the clean images, random points inside the threat, and points along the gradient of the loss."""
    yield x
    if threat is None or not threat.eps or threat.minimal:
        return
    yield threat.random_start(x, RowRng(0, "rounding", torch.arange(len(x), device=x.device)))
    if not model.differentiable:
        return
    images = x.detach().requires_grad_()
    with model.using(config), torch.enable_grad():
        logits = model.uncounted(images)
        loss = criteria.ce(logits, logits.detach().argmax(1)).sum()
        (gradient,) = torch.autograd.grad(loss, images)
    yield threat.project(x + float(threat.eps) * threat.ascent(gradient.nan_to_num()), x)


def _logits(model: InstrumentedModel, config: ExecutionConfig, x: Images) -> Logits:
    # A random model has the same draws in both precisions, as far as they are drawn in the same order.
    with torch.no_grad(), model.using(config), own_randomness("rounding"):
        return model.uncounted(x)
