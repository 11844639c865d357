"""What a pass of the model takes: its memory, its seconds, and the fastest batch size."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robustkit.core.errors import ModelError, UsageError
from robustkit.core.memory import free_memory
from robustkit.core.out_of_memory import is_out_of_memory, try_in_memory
from robustkit.core.shapes import Images, Logits
from robustkit.engine.model.instrumented_model import (
    PART_SECONDS,
    SLOW_BATCH_SECONDS,
    InstrumentedModel,
)
from robustkit.models.ensembles.mixture import Mixture
from robustkit.models.failures import described

# A net is run on one CPU thread if the tensors that its backward pass reads for one image, weights included, have
# fewer bytes.
ONE_THREAD_MAX_BYTES = 1 << 20
# Another batch size or config must save a tenth of the time, so that measurement noise does not choose it.
MAX_TIME_SHARE = 0.9


def measure(model: InstrumentedModel, image: Images, max_batch: int) -> None:
    """Learn the number of classes, the memory and the time of a pass from one image (1 C H W), uncounted.

    The memory of an image is that of the tensors that autograd keeps, each once, without parameters and buffers.

    Sets `num_classes`, `differentiable`, `backward_error`, `saved_bytes`, `micro_batch`, `threads`, `seconds` and
    `slow_batch`. `micro_batch` is what can go forward and backward in half of the free memory, from 1 to
    `max_batch`; the other half is for gradients, the workspace of kernels and other tensors. Nothing is known of
    the memory of a model without a gradient, which saves nothing.

    Raises:
        UsageError: if the model's code fails.
    """
    kept = list[Tensor]()

    def add(tensor: Tensor) -> Tensor:
        kept.append(tensor)
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
    model.saved_bytes = _activation_bytes(kept, classifier)
    use = sum(tensor.nbytes for tensor in kept)
    kept.clear()
    model.differentiable = _has_gradient(model, logits, image)
    model.micro_batch = min(max_batch, max(1, free_memory(model.device) // 2 // max(model.saved_bytes, 1)))
    if 0 < use < ONE_THREAD_MAX_BYTES:
        model.threads = 1
    if model.seconds * max_batch > SLOW_BATCH_SECONDS:
        # The first pass of a process takes longer than others.
        begun = time.perf_counter()
        with torch.no_grad():
            classifier(image)
        model.seconds = model.since(begun)
        slow = model.seconds * max_batch > SLOW_BATCH_SECONDS
        model.slow_batch = max(int(PART_SECONDS / model.seconds), 1) if slow else None


def _activation_bytes(kept: Sequence[Tensor], model: nn.Module) -> int:
    """Return the bytes of tensors that autograd keeps for an image: each storage once, weights not at all."""
    weights = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
    found = {_storage(tensor): tensor for tensor in kept}
    return sum(tensor.untyped_storage().nbytes() for key, tensor in found.items() if key not in weights)


def _storage(tensor: Tensor) -> int:
    """Return what identifies the memory of a tensor while it exists."""
    identity: int = tensor.untyped_storage()._cdata
    return identity


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


def fastest_batch(model: InstrumentedModel, x: Images, slots: int, max_slots: int) -> int:
    """Return the fastest batch size for a pass.

    Args:
        model: measured.
        x: some images (B C H W), which are repeated.
        slots: the batch size that is doubled while the images per second rise by a tenth.
        max_slots: what the result is at most, as it is at most what fits into memory.
    """
    largest = min(max_slots, model.micro_batch or max_slots)
    best, size, fastest = 0.0, min(slots, largest), 1
    while size <= largest:
        batch = x.repeat(-(-size // len(x)), 1, 1, 1)[:size]
        seconds = _seconds_of(model, batch)
        if seconds is None or MAX_TIME_SHARE * size / seconds < best:
            break
        best, fastest, size = size / seconds, size, 2 * size
    return fastest


def _seconds_of(model: InstrumentedModel, x: Images) -> float | None:
    """Return the least seconds of a forward and backward pass of x; None if it is too large for the device."""
    try:
        return try_in_memory(lambda: min(timed_pass(model, x)[0] for _ in range(3)), model.device)
    except RuntimeError:
        return None


def timed_pass(model: InstrumentedModel, x: Images) -> tuple[float, Logits]:
    """Return seconds and logits (B K) of a forward and backward pass of x (B C H W), uncounted."""
    images = x.detach().requires_grad_()
    begun = time.perf_counter()
    logits = model.uncounted(images)
    if logits.requires_grad:
        torch.autograd.grad(logits.sum(), images)
    return model.since(begun), logits.detach()
