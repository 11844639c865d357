"""The model as attacks see it: its passes counted, in the search's precision, cut to what fits into memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from robustkit.core.determinism import deterministic_convolutions
from robustkit.core.devices import ComputeDevice
from robustkit.core.errors import RunError
from robustkit.core.float32 import float32_operations
from robustkit.core.out_of_memory import NO_MEMORY
from robustkit.core.shapes import Images, Logits
from robustkit.gradient_views.aggregator_substitutes import members_and_output
from robustkit.gradient_views.view_kinds import MeanView, MembersView
from robustkit.models.classifier import Classifier
from robustkit.runs.recorded_outputs import ACTIVE, OutputRecord

# The most images that an execution config is tried on.
MAX_TRIAL_BATCH = 16
# A net is slow if the forward pass of a full batch may take more than the first number of seconds; its batches are
# cut into parts that take about the second number of seconds.
SLOW_BATCH_SECONDS, PART_SECONDS = 10.0, 1.0
# The precisions of a search: the type of autocast, and the least bound on the rounding of margins, as a share of
# the largest logit; what is measured on the model can be larger.
DTYPES = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
ROUNDING = {"fp32": 0.0, "tf32": 2.0**-8, "bf16": 2.0**-6, "fp16": 2.0**-9}


class CountsBackward(Protocol):
    """An object that counts the images that went backward through it."""

    backwards: int


@dataclass(frozen=True)
class ExecutionConfig:
    """How the model is run.

    Attributes:
        net: the model, its copy with folded batch norms, or a copy of either with converted weights.
        precision: a key of DTYPES.
        layout: memory layout of the images.
        folded: whether batch norms are folded.
        original: the net that `net` is a copy of with converted weights; None if it is not one.
        rounding: a bound on the rounding error of margins that was measured, as a share of the largest logit.
    """

    net: Classifier
    precision: str = "fp32"
    layout: torch.memory_format = torch.contiguous_format
    folded: bool = False
    original: Classifier | None = None
    rounding: float = 0.0

    @property
    def in_float32(self) -> ExecutionConfig:
        """The same in float32."""
        if self.precision == "fp32":
            return self
        return ExecutionConfig(self.original or self.net, layout=self.layout, folded=self.folded)

    @property
    def dtype(self) -> torch.dtype | None:
        """The type that autocast casts to; None for none."""
        return DTYPES[self.precision]


class InstrumentedModel:
    """A callable from images (B C H W) in [0, 1] to logits (B K, float32) that counts images in both directions.

    Where the logits do not depend differentiably on the images, or the model's backward pass raises an error
    (`backward_error`), the gradient is zero and `detached` is True.

    Attributes:
        model: the classifier.
        device: where it is.
        config: how it is run now.
        random: whether its logits are random.
        views: differentiable substitutes for its gradients, by name; a view may have several parts.
        num_classes: of its logits, once known.
        micro_batch: the most images in one pass of the net; larger batches are cut and their activations
            recomputed in the backward pass, so that an attack's random numbers do not depend on the memory.
        slow_batch: the most images in one pass of a slow net, chosen so that a pass takes about a second: a killed
            run repeats at most the pass that it was in. None for other nets.
        saved_bytes: that autograd saves for one image.
        differentiable: whether its backward pass works.
        seconds: of a forward pass of one image.
        threads: CPU threads for this net; a tiny one runs faster on one.
        forwards: images that went forward so far, each as often as it did.
        backwards: images that went backward so far.
        on_forward: called with `forwards` before each pass.
    """

    def __init__(self, model: Classifier, device: torch.device, precision: str = "fp32") -> None:
        """Count from 0, with the precision (a key of DTYPES) that a search starts with."""
        self.model = model
        self.device = device
        self.config = ExecutionConfig(model, precision)
        self.random = False
        self.views: Mapping[str, Sequence[Callable[[Images], Tensor]]] = {}
        self.num_classes: int | None = model.num_classes
        self.micro_batch: int | None = None
        self.slow_batch: int | None = None
        self.saved_bytes, self.differentiable, self.seconds = 0, True, 0.0
        self.backward_error = ""
        self.threads = torch.get_num_threads()
        self.forwards = 0
        self.backwards = 0
        # `_backwards_before` is the value of `backwards` when a gradient was last requested, -1 before that.
        self._detached, self._backwards_before = False, -1
        self.on_forward: Callable[[int], None] = lambda forwards: None

    def __call__(self, x: Images) -> Logits:
        """Return the logits (B K), float32, of images x (B C H W)."""
        return self._counted(x, self.uncounted)

    def view(self, name: str, part: int = 0) -> Callable[[Images], Tensor]:
        """Return one part of a view, counted as the model is; the model itself for the name ""."""
        if not name:
            return self
        net = self.views[name][part]
        if isinstance(net, MembersView):
            return lambda x: net.combined(self.members(x))
        return partial(self._counted, net=net)

    def members(self, x: Images) -> Tensor:
        """Return the logits of an ensemble's members, then its own (B N+1 K), float32, by one counted pass."""
        return self._counted(x, self._uncounted_members)

    def shares_passes(self, view: str) -> bool:
        """Return whether a view takes only the logits that `members` returns."""
        parts = self.views.get(view, ())
        return bool(parts) and all(isinstance(part, MembersView) for part in parts)

    def observe(self, read: Callable[[Callable[[Images], Logits], Images], Tensor], x: Images) -> Tensor:
        """Return what `read(net, x)` reads inside the model during a pass of x (B C H W), counted as one pass."""
        return self._counted(x, partial(read, self.uncounted))

    def mean(self, x: Images) -> Logits:
        """Return the mean logits (B K) of several passes; a random model has new draws in each."""
        return self._counted(x, MeanView(self.uncounted, sigma=0.0))

    def passes(self, view: str) -> list[int]:
        """Return how many passes of the model one call of each part of a view takes; [1] for the name ""."""
        return [getattr(part, "passes", 1) for part in self.views[view]] if view else [1]

    def uncounted(self, x: Images) -> Logits:
        """Return the logits (B K), float32, by the current config, without counting."""
        config = self.config
        with torch.autocast(self.device.type, config.dtype, enabled=config.dtype is not None):
            logits: Logits = config.net(x, config.layout)
        return logits.float()

    def _uncounted_members(self, x: Images) -> Tensor:
        config = self.config
        with torch.autocast(self.device.type, config.dtype, enabled=config.dtype is not None):
            return members_and_output(config.net, x, config.layout).float()

    def logits_fp32(self, x: Images) -> Logits:
        """Return the logits (B K) that verdicts use: the model itself in float32, without a gradient."""
        self.forwards += len(x)
        with torch.no_grad(), self.using(ExecutionConfig(self.model)), deterministic_convolutions():
            return self._in_micro_batches(x, False, self.uncounted)

    def _counted(self, x: Images, net: Callable[[Images], Tensor]) -> Tensor:
        passes = getattr(net, "passes", 1)
        self.forwards += len(x) * passes
        self.on_forward(self.forwards)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self._in_micro_batches(x, False, net, passes)
        if self.backward_error and net == self.uncounted:
            with torch.no_grad():
                logits = self._in_micro_batches(x, False, net, passes)
        else:
            logits = self._in_micro_batches(CountBackward.apply(x, self, passes), True, net, passes)
        self._detached |= not logits.requires_grad
        return Linked.apply(logits, x, self)  # type: ignore[no-any-return]

    @property
    def detached(self) -> bool:
        """Whether a gradient was requested of logits that do not have one."""
        return self._detached or self._backwards_before == self.backwards

    @detached.setter
    def detached(self, detached: bool) -> None:
        self._detached, self._backwards_before = detached, -1

    def expect_backward(self) -> None:
        """Note that a gradient was requested: `backwards` has to rise."""
        self._detached |= self._backwards_before == self.backwards
        self._backwards_before = self.backwards

    @property
    def rounding(self) -> float:
        """A bound on the rounding error of margins, as a share of the largest logit; 0 in float32."""
        return max(ROUNDING[self.config.precision], self.config.rounding)

    @contextmanager
    def using(self, config: ExecutionConfig) -> Iterator[None]:
        """Run the model by this config inside."""
        before = self.config
        self.config = config
        try:
            with float32_operations("tf32" if self.config.precision == "tf32" else "ieee"):
                yield
        finally:
            self.config = before

    def since(self, begun: float) -> float:
        """Return the seconds since `begun` on the performance counter, once the device has finished its work."""
        ComputeDevice(self.device).synchronize()
        return time.perf_counter() - begun

    @property
    def trial_batch(self) -> int:
        """How many images execution configs are tried on: fewer for a slow net."""
        if self.slow_batch is None:
            return MAX_TRIAL_BATCH
        return max(1, min(MAX_TRIAL_BATCH, int(SLOW_BATCH_SECONDS / (6 * self.seconds))))

    @property
    def layout(self) -> str:
        """The name of the current memory layout."""
        return "channels_last" if self.config.layout == torch.channels_last else "contiguous"

    @property
    def precision(self) -> str:
        """The name of the current precision."""
        return self.config.precision

    def _in_micro_batches(
        self, x: Images, differentiable: bool, net: Callable[[Images], Tensor], passes: int = 1
    ) -> Tensor:
        """Return a net's outputs for x; one call of the net takes so many passes, each of which keeps a graph."""
        limit = len(x) if self.micro_batch is None else max(self.micro_batch // passes, 1)
        record = ACTIVE.get()
        if record is not None and record.disabled:
            record = None
        parts, done = list[Tensor](), 0
        while done < len(x) or not parts:
            recorded = record.rows if record else None
            if recorded is None and self.slow_batch is not None:
                recorded = max(min(limit, self.slow_batch // passes), 1)
            part = x[done : done + (recorded or limit)]
            parts.append(self._run(part, differentiable, net, len(x) <= limit, record))
            done += len(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _run(
        self,
        x: Images,
        differentiable: bool,
        net: Callable[[Images], Tensor],
        fits: bool,
        record: OutputRecord | None,
    ) -> Tensor:
        """Return a net's outputs for x, recorded or new; `fits` is whether the graph fits into memory."""
        config, begun = self.config, time.perf_counter()
        if record is not None and not record.disabled:

            def run_now(images: Images) -> Tensor:
                # A gradient may be requested when the search uses another config.
                with self.using(config):
                    return net(images)

            has_gradient = differentiable and (self.differentiable or net != self.uncounted)
            output = record.call(run_now, x, differentiable=has_gradient, keep=fits)
        elif differentiable and not fits:
            # Early stopping would raise an error inside the net.
            with set_checkpoint_early_stop(False):
                return checkpoint(net, x, use_reentrant=False)
        else:
            output = net(x)
        if self.slow_batch is not None and len(x) >= self.slow_batch and self.since(begun) < PART_SECONDS / 2:
            self.slow_batch *= 2
        return output


def halve_micro_batch(model: InstrumentedModel, images: int) -> int:
    """Halve the images in one pass of the net, at most `images` before, and return their new number.

    Raises:
        RunError: it is one image already.
    """
    size = min(model.micro_batch or images, images)
    if size == 1:
        raise RunError(NO_MEMORY)
    model.micro_batch = size // 2
    return model.micro_batch


class CountBackward(torch.autograd.Function):
    """The identity; its backward pass counts the rows, times the passes through the model that it belongs to."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counter: CountsBackward, passes: int) -> Tensor:  # noqa: D102
        ctx.counter, ctx.passes = counter, passes
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:  # noqa: D102
        ctx.counter.backwards += len(gradients[0]) * ctx.passes
        return gradients[0], None, None


class Linked(torch.autograd.Function):
    """Connects logits (B K) with the images x in autograd: where they are not connected, the gradient is zero."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, x: Tensor, model: InstrumentedModel) -> Tensor:  # noqa: D102
        ctx.model, ctx.shape = model, x.shape
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:  # noqa: D102
        if len(gradients[0]):
            ctx.model.expect_backward()
        return gradients[0], gradients[0].new_zeros(()).expand(ctx.shape), None
