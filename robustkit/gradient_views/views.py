"""Views of a model: differentiable stand-ins to search adversarials on, which are then judged on the model itself.

They come from three sources. What the model exports: `net.views()`, a dict of named callables on the net's own
(normalised) inputs, or `twin(model, x)` of a defense, a differentiable version of its call. What an ensemble's
parts say: any part with `stacked(x) -> (B N K)` has its aggregator replaced (`ladder`). And what a look at one
forward pass finds: where gradients stop (`mending`), logits deeper inside (`heads`), and dice.

A view that fails, that has no finite gradient, or whose gradient is the model's own is left out: an honest single
net has none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.core.isolation import own_randomness
from robustkit.core.shapes import Images, Logits
from robustkit.gradient_views.aggregator_substitutes import (
    Substitute,
    alone,
    combined,
    ensemble,
    mean_logit,
    substitutes,
)
from robustkit.gradient_views.findings import Finding
from robustkit.gradient_views.fitted import fit, side_by_side
from robustkit.gradient_views.heads import Heads
from robustkit.gradient_views.straight_through import through
from robustkit.gradient_views.tracer import Tracer
from robustkit.models.classifier import Classifier
from robustkit.runs.recorded_outputs import run_once

View = Callable[[Images], Logits]

FEW = 16
# Gradients this parallel on every image lead to the same points.
PARALLEL = 0.999
NOISE = 1e-4
# Of `smooth`: draws, and the deviation of the input noise in [0, 1] pixel units.
DRAWS, SIGMA = 8, 0.03


class Views(dict[str, View]):
    """Views by name; `mends` says what was found to hide gradients."""

    mends: tuple[Finding, ...] = ()


def views(model: Classifier, x: Images, *, random: bool = False) -> Views:
    """Return the views of a classifier that images x (B C H W) on [0, 1] show to be worth attacking.

    One that is known to be `random` may answer alike for once; of another two answers are compared. Model,
    generators and gradients are left as they were. Costs some tens of forward and backward passes over the first
    16 images.
    """
    x = x[:FEW].detach()
    with own_randomness("views"), _still(model):
        found = Views()
        deployed = run_once("model", lambda: _plain(model, x).cpu()).to(x.device)
        random = random or run_once("draws", lambda: draws(model, x, looks=1))
        labels = deployed.argmax(1)
        own = run_once("slopes", lambda: _slopes(model, x, labels))
        kept = [] if own is None else [own]
        look = _look(model, x)
        bends = () if look is None else tuple(look.bends)
        random = random or (look is not None and look.drew)
        for name, view in _candidates(model, x, bends, random, own is None):
            slopes = run_once(name, partial(_slopes, view, x, labels))
            if slopes is None or any(_parallel(slopes, other) for other in kept):
                continue
            found[name] = view
            kept.append(slopes)
        if found:
            inner = (view for name, view in found.items() if name.startswith("inner-"))
            found["smooth"] = Smooth(next(inner, Mended(model, bends=bends)))
            found.mends = tuple(look.found) if look is not None else ()
    return found


@dataclass(frozen=True)
class Mended:
    """A model with gradients where it hides them.

    `calm` takes its dice away, `part` and `rung` its aggregator, `loose` what it rounds.
    """

    model: Classifier
    bends: tuple[nn.Module, ...] = ()
    calm: bool = False
    loose: bool = False
    part: nn.Module | None = None
    entry: Substitute = mean_logit
    straight: bool = False

    def sources(self, x: Images) -> Tensor:
        """Return what of x (B C H W) leaves torch and what indices are chosen from, side by side (B D)."""
        found: list[Tensor] = []
        # A single image could be taken for a batch of its channels.
        images = x.repeat(2, 1, 1, 1) if len(x) == 1 else x
        with torch.enable_grad():
            images = images if images.requires_grad else images.detach().requires_grad_()
            with Tracer(self.model, calm=self.calm, bends=self.bends, sources=found):
                self.model(images)
        return side_by_side(found, len(images))[: len(x)]

    def __call__(self, x: Images, heads: Heads | None = None) -> Logits:
        """Return the logits of x, and show what is computed to who looks for heads."""
        with ExitStack() as stack:
            if self.part is not None:
                stack.enter_context(combined(self.part, self.entry, straight=self.straight))
            wanted = torch.is_grad_enabled() and x.requires_grad
            if not (wanted or self.calm or self.loose):
                logits: Logits = self.model(x)
                return logits
            if not wanted:
                with torch.enable_grad():
                    logits = self(x.detach().requires_grad_(), heads)
                return logits.detach()
            mending = stack.enter_context(
                Tracer(self.model, heads=heads, calm=self.calm, loose=self.loose, bends=self.bends)
            )
            logits = mending.honest(self.model(x))
            return logits


@dataclass(frozen=True)
class Inner:
    """The logits that a model computes on its way, several heads' combined by a rung of the ladder."""

    mended: Mended
    classes: int
    count: int
    entry: Substitute
    straight: bool = False

    def __call__(self, x: Images) -> Logits:
        """Return the logits of x."""
        with torch.enable_grad():
            images = x if x.requires_grad else x.detach().requires_grad_()
            heads = Heads((len(x), self.classes))
            deployed = self.mended(images, heads)
        if len(heads.found) < self.count:
            raise RuntimeError(f"{len(heads.found)} heads were seen instead of {self.count}.")
        logits = self.entry(torch.stack(heads.found[: self.count], 1))
        logits = through(deployed, logits) if self.straight else logits
        return logits if torch.is_grad_enabled() and x.requires_grad else logits.detach()


@dataclass(frozen=True)
class Fitted:
    """A linear fit of a model's decisions to what it makes them of; see `robustkit.gradient_views.fitted`."""

    mended: Mended
    weights: Tensor

    def __call__(self, x: Images) -> Logits:
        """Return the logits of x."""
        features = self.mended.sources(x)
        logits = features @ self.weights.to(features)
        return logits if torch.is_grad_enabled() and x.requires_grad else logits.detach()


@dataclass(frozen=True)
class Frozen:
    """A view whose dice fall alike in every pass."""

    view: View

    def __call__(self, x: Images) -> Logits:
        """Return the logits of x."""
        with own_randomness("frozen"):
            return self.view(x)


@dataclass(frozen=True)
class Smooth:
    """The mean of a view over noisy copies of the images, and over its dice."""

    view: View
    draws: int = DRAWS
    sigma: float = SIGMA

    @property
    def passes(self) -> int:
        """How many passes through the model an answer takes."""
        return self.draws

    def __call__(self, x: Images) -> Logits:
        """Return the logits of x."""
        answers = [self.view(self._noisy(x)) for _ in range(self.draws)]
        return torch.stack(answers).mean(0)

    def _noisy(self, x: Images) -> Images:
        """Return a noisy copy on [0, 1]; what is cut off has its gradient still."""
        if not self.sigma:
            return x
        return through((x + self.sigma * torch.randn_like(x)).clamp(0, 1), x)


def _candidates(
    model: Classifier, x: Images, bends: tuple[nn.Module, ...], random: bool, hidden: bool
) -> Iterator[tuple[str, View]]:
    """Yield views that may be worth something; of a model whose gradient is `hidden` also a fitted one."""
    exported = getattr(model.net, "views", None)
    if callable(exported):
        for name, call in exported().items():
            yield name, model.with_net(_Exported(call))
    if any(hasattr(defense, "twin") for defense in model.defenses):
        twin = copy.copy(model)
        twin.defenses = tuple(getattr(defense, "twin", defense) for defense in model.defenses)
        yield "twin", Mended(twin)
    mended = Mended(model, bends=bends)
    part = ensemble(model)
    if part is not None:
        for name, substitute in substitutes(_predictors(model, part, x)).items():
            yield name, replace(mended, part=part, entry=substitute)
        yield "straight-through", replace(mended, part=part, entry=mean_logit, straight=True)
    yield "mended", mended
    yield "loosened", replace(mended, loose=True)
    if random:
        yield "calm", replace(mended, calm=True)
        yield "frozen", Frozen(mended)
    yield from _inner(mended, x)
    if hidden:
        with suppress(RuntimeError):
            yield "fitted", Fitted(mended, run_once("fitted", lambda: fit(mended.sources, model, x).cpu()))
    if random:
        yield from ((f"calm-{name}", view) for name, view in _inner(replace(mended, calm=True), x))


class _Exported(nn.Module):
    """A callable that a net exports, as a module."""

    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


def _predictors(model: Classifier, part: nn.Module, x: Images) -> int:
    """Return how many predictors an ensemble has."""
    seen: list[int] = []

    def note(stack: Tensor) -> Tensor:
        seen.append(stack.shape[1])
        return stack.mean(1)

    with torch.no_grad(), combined(part, note):
        model(x[:2])
    return seen[0] if seen else 0


def _inner(mended: Mended, x: Images) -> Iterator[tuple[str, View]]:
    """Yield the logits inside, if there are any; of several heads the rungs of the ladder."""
    shape = _plain(mended, x).shape
    heads = Heads(tuple(shape))
    try:
        with torch.enable_grad():
            mended(x.clone().requires_grad_(), heads)
    except Exception:
        return
    count = len(heads.found)
    if count == 1:
        yield "inner-logits", Inner(mended, shape[1], 1, alone(0))
    elif count > 1:
        for name, substitute in substitutes(count).items():
            yield f"inner-{name}", Inner(mended, shape[1], count, substitute)
        yield "inner-straight-through", Inner(mended, shape[1], count, mean_logit, straight=True)


def _look(model: Classifier, x: Images) -> Tracer | None:
    """Return what is seen in a forward pass; None where it cannot be mended."""
    try:
        with torch.enable_grad(), Tracer(model, told=True) as mending:
            model(x.clone().requires_grad_())
    except Exception:
        return None
    return mending


def _plain(view: View, x: Images) -> Logits:
    with torch.no_grad():
        return view(x)


def draws(view: View, x: Images, looks: int = DRAWS) -> bool:
    """Return whether one of so many looks at x (B C H W) differs from the first by more than rounding."""
    first = _plain(view, x)
    return any(bool((_plain(view, x) - first).abs().max() > NOISE * first.abs().max()) for _ in range(looks))


def _slopes(view: View, x: Images, labels: Tensor) -> list[Tensor] | None:
    """Return the gradients of cross-entropy and margin (B P); None from a view that is of no use.

    Dice fall alike in all views.
    """
    try:
        with torch.enable_grad(), own_randomness("slopes"):
            images = x.clone().requires_grad_()
            logits = view(images)
            if logits.shape[0] != len(x) or logits.dim() != 2 or not logits.requires_grad:
                return None
            own = logits.gather(1, labels[:, None])[:, 0]
            best = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
            losses = (F.cross_entropy(logits, labels, reduction="sum"), (best - own).sum())
            slopes = [torch.autograd.grad(loss, images, retain_graph=True)[0].flatten(1).cpu() for loss in losses]
    except Exception:
        return None
    if not all(slope.isfinite().all() for slope in slopes) or not any(slope.any() for slope in slopes):
        return None
    return slopes


def _parallel(one: list[Tensor], other: list[Tensor]) -> bool:
    """Return whether gradients have the same directions on every image."""
    for a, b in zip(one, other, strict=True):
        zero = (a == 0).all(1) & (b == 0).all(1)
        if not bool(((F.cosine_similarity(a.double(), b.double(), eps=1e-300) > PARALLEL) | zero).all()):
            return False
    return True


@contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    """Take parameters out of autograd inside, so that only what depends on the images has a gradient."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
