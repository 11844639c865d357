"""The model as attacks see it: counted, in the search precision, and in pieces that fit into memory."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from robustkit.core.errors import ModelError, UsageError
from robustkit.core.isolation import quietly
from robustkit.core.shapes import Images, Logits
from robustkit.data import memory
from robustkit.engine.failures import described, is_out_of_memory
from robustkit.engine.model.batchnorm_folding import folded
from robustkit.gradient_views.views import Smooth
from robustkit.models.classifier import Classifier
from robustkit.models.ensembles.mixture import Mixture
from robustkit.runs.recorded_answers import current, once

TINY = 1 << 20
# The most images that a way to run the model is tried on.
TRIAL = 16
# Another precision or layout must save a tenth of the time, so that noise does not choose it.
WORTH = 0.9
# A way that takes so many times the plain one's time for two images, and so many seconds, is not tried on more.
GIVE_UP, GIVE_UP_SECONDS = 3, 0.05
# A net is slow if the forward pass of a full batch may take so many seconds; then batches are cut into parts that
# take about so many seconds each.
SLOW, GROWING = 10.0, 1.0
LAYOUTS = (torch.contiguous_format, torch.channels_last)
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Counts(Protocol):
    """What counts the rows that went back through it."""

    backwards: int


@dataclass(frozen=True)
class ExecutionConfig:
    """How the model is run: the net or its folded copy, a precision (None: float32), a memory layout."""

    net: Classifier
    dtype: torch.dtype | None = None
    layout: torch.memory_format = torch.contiguous_format


class InstrumentedModel:
    """A callable that counts sample-propagations through a classifier, in both directions.

    `random` is whether the model answers by a draw; `views` are what may stand in for its gradients, by name.

    Logits come out in float32 whatever the precision. Where they do not depend on the input
    differentiably, or the model's backward pass fails with `backward_error`, the gradient is zero rather than an
    error, and `detached` says so. `piece` is the most
    images that the net sees at once: larger batches are cut, and their activations recomputed in the backward
    pass, so that the numbers drawn by an attack never depend on the memory at hand. `quick` is the most
    images that a slow net is given at once, so that an answer is recorded every few seconds; None for other nets.
    """

    def __init__(self, model: Classifier, device: torch.device, precision: str = "fp32") -> None:
        self.model = model
        self.device = device
        self.way = ExecutionConfig(model, DTYPES[precision])
        self.random = False
        self.views: Mapping[str, Sequence[Callable[[Images], Tensor]]] = {}
        self.num_classes: int | None = model.num_classes
        self.piece: int | None = None
        self.quick: int | None = None
        self.saved, self.differentiable, self.seconds = 0, True, 0.0
        self.backward_error = ""
        self.threads = torch.get_num_threads()
        self.forwards = 0
        self.backwards = 0
        # `awaited` is what `backwards` was when a gradient was last asked for.
        self._detached, self.awaited = False, -1
        self.on_forward: Callable[[int], None] = lambda forwards: None

    def __call__(self, x: Images) -> Logits:
        """Return the logits of x (B C H W), float32 (B K)."""
        return self._counted(x, self._net)

    def through(self, view: str, number: int = 0) -> Callable[[Images], Tensor]:
        """Return what answers as a view of the model does, counted like the model; without a name, the model.

        A view may be several, of which one is meant.
        """
        return partial(self._counted, net=self.views[view][number]) if view else self

    def looking(self, look: Callable[[Callable[[Images], Logits], Images], Tensor], x: Images) -> Tensor:
        """Return what `look` sees in the model's parts while it answers to x (B C H W); counted like an answer."""
        return self._counted(x, partial(look, self._net))

    def mean(self, x: Images) -> Logits:
        """Return the mean of several answers to x, of which a random model draws each anew."""
        return self._counted(x, Smooth(self._net, sigma=0.0))

    def passes(self, view: str) -> list[int]:
        """Return how many passes through the model an answer of each part of a view takes."""
        return [getattr(part, "passes", 1) for part in self.views[view]] if view else [1]

    def _counted(self, x: Images, net: Callable[[Images], Tensor]) -> Tensor:
        passes = getattr(net, "passes", 1)
        self.forwards += len(x) * passes
        self.on_forward(self.forwards)
        differentiable = torch.is_grad_enabled() and x.requires_grad
        if not differentiable:
            return self._in_pieces(x, False, net, passes)
        if self.backward_error and net == self._net:
            with torch.no_grad():
                logits = self._in_pieces(x, False, net, passes)
        else:
            logits = self._in_pieces(CountBackward.apply(x, self, passes), True, net, passes)
        self._detached |= not logits.requires_grad
        return Linked.apply(logits, x, self)  # type: ignore[no-any-return]

    @property
    def detached(self) -> bool:
        """Whether logits were asked for a gradient that they do not have."""
        return self._detached or self.awaited == self.backwards

    @detached.setter
    def detached(self, detached: bool) -> None:
        self._detached, self.awaited = detached, -1

    def await_backward(self) -> None:
        """Note that a gradient was asked for: it is to come by `backwards`."""
        self._detached |= self.awaited == self.backwards
        self.awaited = self.backwards

    @property
    def rounding(self) -> float:
        """How far logits may be off, as a share of the largest, in a search of low precision; else 0."""
        return 0.0 if self.way.dtype is None else 2 * torch.finfo(self.way.dtype).eps

    def exact(self, x: Images) -> Logits:
        """Return the logits that verdicts rest on: float32, no gradient, the same pieces."""
        self.forwards += len(x)
        with torch.no_grad(), self.searching():
            return self._in_pieces(x, False, self._net)

    @contextmanager
    def searching(self, way: ExecutionConfig | None = None) -> Iterator[None]:
        """Run the model in this way inside; without one as verdicts want it: itself, in float32."""
        before = self.way
        self.way = way or ExecutionConfig(self.model)
        try:
            yield
        finally:
            self.way = before

    def size_up(self, image: Images, most: int) -> None:
        """Learn from one image (1 C H W) the number of classes, and how many images fit into memory.

        The piece becomes what may go forward and backward at once in half of the free memory, judged by the
        bytes that autograd saves for one image, from 1 to `most`. This one forward is not counted. `threads`
        is what the net is worth on a CPU: threads that share a tiny one spend their time waiting for each
        other, and many times that when another process wants the cores too. A model without a gradient saves
        nothing, so nothing is known of it.
        """
        saved = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal saved
            saved += tensor.nbytes
            return tensor

        # Of several nets one: their mixture keeps no graph, or as many as they are.
        net = self.model.net
        model = self.model.with_net(net.at(0)) if isinstance(net, Mixture) else self.model
        image, begun = image.detach().requires_grad_(), time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), torch.enable_grad():
            try:
                logits = model(image)
            except ModelError as error:
                raise UsageError(str(error)) from error
        self.seconds = time.perf_counter() - begun
        self.num_classes, self.differentiable = logits.shape[1], self._has_gradient(logits, image)
        self.saved = saved
        self.piece = min(most, max(1, free_memory(self.device) // 2 // max(saved, 1)))
        if 0 < saved < TINY:
            self.threads = 1
        if self.seconds * most > SLOW:
            # The first pass of a process takes longer than others.
            with torch.no_grad():
                self.seconds = self._seconds(model, image)
            self.quick = max(int(GROWING / self.seconds), 1) if self.seconds * most > SLOW else None

    def _seconds(self, model: Classifier, x: Images) -> float:
        begun = time.perf_counter()
        model(x)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - begun

    @property
    def trial(self) -> int:
        """How many images the ways to run the model are tried on: fewer of a slow net."""
        return TRIAL if self.quick is None else max(1, min(TRIAL, int(SLOW / (6 * self.seconds))))

    def _has_gradient(self, logits: Logits, image: Images) -> bool:
        """Return whether the model's backward pass works and leads to the image."""
        if not logits.requires_grad:
            return False
        try:
            return torch.autograd.grad(logits.sum(), image, allow_unused=True)[0] is not None
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self.backward_error = described(error)
            return False

    @property
    def layout(self) -> str:
        """The search's memory layout by its name."""
        return "channels_last" if self.way.layout == torch.channels_last else "contiguous"

    @property
    def precision(self) -> str:
        """The search's precision by its name."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.way.dtype)

    def tune(self, x: Images, *, precision: bool) -> None:
        """Choose how to search: with batch norms folded or not, the memory layout, the precision if asked to.

        It is what is fastest on x, forward and backward. What the model refuses, or what shifts its logits by more
        than a tenth of their spread, is out. None of it is counted.
        """
        plain = self._tried(x, self.way)
        if plain is None:
            return
        seconds, exact, of_two = plain
        best = WORTH * seconds
        net = folded(self.model, x) or self.model
        dtypes = [self.way.dtype, torch.bfloat16] if precision else [self.way.dtype]
        for dtype, layout in itertools.product(dtypes, LAYOUTS):
            way = ExecutionConfig(net, dtype, layout)
            tried = None if way == self.way else self._tried(x, way, max(GIVE_UP * of_two, GIVE_UP_SECONDS))
            if tried is None or not tried[1].isfinite().all():
                continue
            near = (tried[1] - exact).abs().amax() <= 0.1 * (exact.amax(1) - exact.amin(1)).mean()
            if near and tried[0] < best:
                best, self.way = tried[0], way

    def widest(self, x: Images, slots: int, most: int) -> int:
        """Return a batch size from `slots` to `most`, doubled as long as images a second rise by a tenth."""
        best = 0.0
        while slots <= min(most, self.piece or most):
            batch = x.repeat(-(-slots // len(x)), 1, 1, 1)[:slots]
            try:
                seconds = min(self._timed(batch)[0] for _ in range(3))
            except (RuntimeError, MemoryError):
                break
            if WORTH * slots / seconds < best:
                break
            best, slots = slots / seconds, 2 * slots
        return max(slots // 2, 1)

    def _tried(
        self, x: Images, way: ExecutionConfig, limit: float = math.inf
    ) -> tuple[float, Logits, float] | None:
        """Return what `_trial` does, once for a run."""
        name = f"{self.device.type} {way.dtype} {way.layout} {way.net is self.model}"
        return once(name, lambda: self._trial(x, way, limit))

    def _trial(
        self, x: Images, way: ExecutionConfig, limit: float = math.inf
    ) -> tuple[float, Logits, float] | None:
        """Return seconds and logits of one forward and backward pass in this way, and the seconds of two images.

        None if the model refuses it, or if the two take longer than the limit.
        """
        try:
            with quietly(), self.searching(way):
                self._timed(x[:2])
                of_two, _ = self._timed(x[:2])
                if of_two > limit:
                    return None
                trials = [self._timed(x) for _ in range(3 if self.quick is None else 1)]
            return min(seconds for seconds, _ in trials[len(trials) // 2 :]), trials[-1][1].cpu(), of_two
        except Exception:  # whatever a stranger's code may raise where it is not run as it expects
            return None

    def _timed(self, x: Images) -> tuple[float, Logits]:
        images = x.detach().requires_grad_()
        begun = time.perf_counter()
        logits = self._net(images)
        if logits.requires_grad:
            torch.autograd.grad(logits.sum(), images)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - begun, logits.detach()

    def _in_pieces(
        self, x: Images, differentiable: bool, net: Callable[[Images], Tensor], passes: int = 1
    ) -> Tensor:
        # Several passes of an answer keep a graph each.
        most = len(x) if self.piece is None else max(self.piece // passes, 1)
        fits, parts, at = len(x) <= most, list[Tensor](), 0
        while at < len(x) or not parts:
            part = x[at : at + self._at_once(most, passes)]
            parts.append(self._answer(part, differentiable, net, fits))
            at += len(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _at_once(self, most: int, passes: int) -> int:
        """Return how many images are answered next: as many as were when this answer was recorded, if it was."""
        answers = current()
        recorded = None if answers is None else answers.rows
        if recorded is not None or self.quick is None:
            return recorded or most
        return max(min(most, self.quick // passes), 1)

    def _answer(self, x: Images, differentiable: bool, net: Callable[[Images], Tensor], fits: bool) -> Tensor:
        answers, way, begun = current(), self.way, time.perf_counter()
        if answers is None or answers.off:
            if differentiable and not fits:
                # It would stop early by an error that it raises inside the net.
                with set_checkpoint_early_stop(False):
                    return checkpoint(net, x, use_reentrant=False)
            return self._paced(net(x), len(x), begun)

        def now(images: Images) -> Tensor:
            # A gradient may be asked for when the search has another way.
            with self.searching(way):
                return net(images)

        leads = differentiable and (self.differentiable or net != self._net)
        return self._paced(answers.ask(now, x, differentiable=leads, keep=fits), len(x), begun)

    def _paced(self, answer: Tensor, images: int, begun: float) -> Tensor:
        """Give a slow net more images at once, if it has answered as many as it may have within a second."""
        if self.quick is not None and images >= self.quick:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            if time.perf_counter() - begun < GROWING / 2:
                self.quick *= 2
        return answer

    def _net(self, x: Images) -> Logits:
        way = self.way
        with torch.autocast(self.device.type, way.dtype, enabled=way.dtype is not None):
            logits: Logits = way.net(x, way.layout)
        return logits.float()


class CountBackward(torch.autograd.Function):
    """The identity; its backward runs once for so many backward passes through the model, and counts the rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, instrumented: Counts, passes: int) -> Tensor:  # noqa: D102
        ctx.instrumented, ctx.passes = instrumented, passes
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:  # noqa: D102
        ctx.instrumented.backwards += len(gradients[0]) * ctx.passes
        return gradients[0], None, None


class Linked(torch.autograd.Function):
    """Logits (B K) that depend on the images x: where they do not by themselves, their gradient is zero."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, x: Tensor, instrumented: InstrumentedModel) -> Tensor:  # noqa: D102
        ctx.instrumented, ctx.shape = instrumented, x.shape
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:  # noqa: D102
        if len(gradients[0]):
            ctx.instrumented.await_backward()
        return gradients[0], gradients[0].new_zeros(()).expand(ctx.shape), None


def free_memory(device: torch.device) -> int:
    """Return the bytes that a device has left."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return memory.free_memory()
