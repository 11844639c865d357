"""What a pass of the model takes, and the fastest way to run it: precision, memory layout, batch size."""

from __future__ import annotations

import itertools
import math
import time

import torch
from torch import Tensor

from robustkit.core.errors import ModelError, UsageError
from robustkit.core.isolation import quietly
from robustkit.core.memory import free_memory
from robustkit.core.shapes import Images, Logits
from robustkit.engine.failures import described, is_out_of_memory
from robustkit.engine.model.batchnorm_folding import folded
from robustkit.engine.model.instrumented_model import (
    PART_SECONDS,
    SLOW_BATCH_SECONDS,
    ExecutionConfig,
    InstrumentedModel,
)
from robustkit.models.ensembles.mixture import Mixture
from robustkit.runs.recorded_outputs import run_once

# A net that saves fewer bytes for autograd per image is run on one CPU thread.
ONE_THREAD_MAX_BYTES = 1 << 20
# Another config must save a tenth of the time, so that measurement noise does not choose it.
MAX_TIME_SHARE = 0.9
# A config is given up if two images take so many times the current config's time, and so many seconds.
GIVE_UP_FACTOR, GIVE_UP_SECONDS = 3, 0.05
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def measure(model: InstrumentedModel, image: Images, max_batch: int) -> None:
    """Learn the number of classes, the memory and the time of a pass from one image (1 C H W), uncounted.

    Sets `num_classes`, `differentiable`, `backward_error`, `saved_bytes`, `micro_batch`, `threads`, `seconds` and
    `slow_batch`. `micro_batch` is what can go forward and backward in half of the free memory, from 1 to
    `max_batch`. Nothing is known of the memory of a model without a gradient, which saves nothing.

    Raises:
        UsageError: if the model's code fails.
    """
    saved = 0

    def add(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += tensor.nbytes
        return tensor

    # A mixture of nets keeps the graph of none or of all of them: measure one net.
    net = model.model.net
    classifier = model.model.with_net(net.at(0)) if isinstance(net, Mixture) else model.model
    image, begun = image.detach().requires_grad_(), time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(add, lambda tensor: tensor), torch.enable_grad():
        try:
            logits = classifier(image)
        except ModelError as error:
            raise UsageError(str(error)) from error
    model.seconds = time.perf_counter() - begun
    model.num_classes = logits.shape[1]
    model.differentiable = _has_gradient(model, logits, image)
    model.saved_bytes = saved
    model.micro_batch = min(max_batch, max(1, free_memory(model.device) // 2 // max(saved, 1)))
    if 0 < saved < ONE_THREAD_MAX_BYTES:
        model.threads = 1
    if model.seconds * max_batch > SLOW_BATCH_SECONDS:
        # The first pass of a process takes longer than others.
        begun = time.perf_counter()
        with torch.no_grad():
            classifier(image)
        model.seconds = model.since(begun)
        slow = model.seconds * max_batch > SLOW_BATCH_SECONDS
        model.slow_batch = max(int(PART_SECONDS / model.seconds), 1) if slow else None


def _has_gradient(model: InstrumentedModel, logits: Logits, image: Images) -> bool:
    """Return whether the model's backward pass works and reaches the image."""
    if not logits.requires_grad:
        return False
    try:
        return torch.autograd.grad(logits.sum(), image, allow_unused=True)[0] is not None
    except Exception as error:
        if is_out_of_memory(error):
            raise
        model.backward_error = described(error)
        return False


def tune(model: InstrumentedModel, x: Images, *, precision: bool) -> None:
    """Set `model.config` to the fastest for a forward and backward pass of x, uncounted.

    Tried are batch norms folded into convolutions, two memory layouts and, if `precision`, bfloat16. A config is
    rejected if the model raises an error or its logits shift by more than a tenth of their mean range.

    Args:
        model: with the config to start from.
        x: images to try on (B C H W).
        precision: whether to try other precisions.
    """
    plain = _recorded_trial(model, x, model.config)
    if plain is None:
        return
    seconds, expected, seconds_of_two = plain
    best = MAX_TIME_SHARE * seconds
    limit = max(GIVE_UP_FACTOR * seconds_of_two, GIVE_UP_SECONDS)
    net = folded(model.model, x) or model.model
    dtypes = [model.config.dtype, torch.bfloat16] if precision else [model.config.dtype]
    for dtype, layout in itertools.product(dtypes, LAYOUTS):
        config = ExecutionConfig(net, dtype, layout)
        result = None if config == model.config else _recorded_trial(model, x, config, limit)
        if result is None or not result[1].isfinite().all():
            continue
        shift = (result[1] - expected).abs().amax()
        same = shift <= 0.1 * (expected.amax(1) - expected.amin(1)).mean()
        if same and result[0] < best:
            best, model.config = result[0], config


def fastest_batch(model: InstrumentedModel, x: Images, slots: int, max_slots: int) -> int:
    """Return a batch size from `slots` to `max_slots`, doubled while the images per second rise by a tenth."""
    best = 0.0
    while slots <= min(max_slots, model.micro_batch or max_slots):
        batch = x.repeat(-(-slots // len(x)), 1, 1, 1)[:slots]
        try:
            seconds = min(timed_pass(model, batch)[0] for _ in range(3))
        except (RuntimeError, MemoryError):
            break
        if MAX_TIME_SHARE * slots / seconds < best:
            break
        best, slots = slots / seconds, 2 * slots
    return max(slots // 2, 1)


def timed_pass(model: InstrumentedModel, x: Images) -> tuple[float, Logits]:
    """Return seconds and logits (B K) of a forward and backward pass of x (B C H W), uncounted."""
    images = x.detach().requires_grad_()
    begun = time.perf_counter()
    logits = model.uncounted(images)
    if logits.requires_grad:
        torch.autograd.grad(logits.sum(), images)
    return model.since(begun), logits.detach()


def _recorded_trial(
    model: InstrumentedModel, x: Images, config: ExecutionConfig, limit: float = math.inf
) -> tuple[float, Logits, float] | None:
    """Return the result of `trial`, measured once per run: a resumed run uses the same config."""
    name = f"{model.device.type} {config.dtype} {config.layout} {config.net is model.model}"
    return run_once(name, lambda: trial(model, x, config, limit))


def trial(
    model: InstrumentedModel, x: Images, config: ExecutionConfig, limit: float = math.inf
) -> tuple[float, Logits, float] | None:
    """Return seconds and logits of a forward and backward pass by a config, and the seconds of two images.

    None if the model raises an error, or if two images take more seconds than the limit.
    """
    try:
        with quietly(), model.using(config):
            timed_pass(model, x[:2])
            seconds_of_two, _ = timed_pass(model, x[:2])
            if seconds_of_two > limit:
                return None
            trials = [timed_pass(model, x) for _ in range(3 if model.slow_batch is None else 1)]
        return min(seconds for seconds, _ in trials[len(trials) // 2 :]), trials[-1][1].cpu(), seconds_of_two
    except Exception:  # whatever the model's code raises under a config that it was not made for
        return None
