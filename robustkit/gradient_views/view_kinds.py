"""The kinds of views: a traced model, its heads, a fitted layer, frozen noise, means of draws."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustkit.core.isolation import own_randomness
from robustkit.core.shapes import Images, Logits
from robustkit.gradient_views.aggregator_substitutes import (
    Substitute,
    combined_by,
    mean_logit,
    members_and_output,
)
from robustkit.gradient_views.fitted import concatenated
from robustkit.gradient_views.heads import Heads
from robustkit.gradient_views.straight_through import with_gradient_of
from robustkit.gradient_views.tracer import Tracer
from robustkit.models.classifier import Classifier

View = Callable[[Images], Logits]
# Of the view `smooth`: number of draws, and standard deviation of the input noise in [0, 1] pixel units.
MEAN_DRAWS, SIGMA = 8, 0.03


@dataclass(frozen=True)
class TracedModel:
    """A model with surrogate gradients where its own stop; see the arguments for its logits.

    Args:
        model: the classifier.
        elementwise: modules that get the gradient of secants.
        noise_free: replace random draws by their means.
        relaxed: use the surrogate's value, too, where it is near the model's own.
        part: an ensemble whose aggregator is replaced by `entry`.
        entry: function from the members' logits (B N K) to logits (B K).
        is_straight_through: keep the ensemble's own logits, with the gradient of `entry`.
    """

    model: Classifier
    elementwise: tuple[nn.Module, ...] = ()
    noise_free: bool = False
    relaxed: bool = False
    part: nn.Module | None = None
    entry: Substitute = mean_logit
    is_straight_through: bool = False

    def sources(self, x: Images) -> Tensor:
        """Return the tensors that leave torch, or that indices are selected from, concatenated (B D)."""
        found: list[Tensor] = []
        # A single image could be mistaken for a batch of its channels.
        images = x.repeat(2, 1, 1, 1) if len(x) == 1 else x
        with torch.enable_grad():
            images = images if images.requires_grad else images.detach().requires_grad_()
            with Tracer(self.model, noise_free=self.noise_free, elementwise=self.elementwise, sources=found):
                self.model(images)
        return concatenated(found, len(images))[: len(x)]

    def __call__(self, x: Images, heads: Heads | None = None) -> Logits:
        """Return the logits (B K) of x; `heads` collects logits inside the model."""
        with ExitStack() as stack:
            if self.part is not None:
                stack.enter_context(
                    combined_by(self.part, self.entry, is_straight_through=self.is_straight_through)
                )
            needs_gradient = torch.is_grad_enabled() and x.requires_grad
            if not (needs_gradient or self.noise_free or self.relaxed):
                logits: Logits = self.model(x)
                return logits
            if not needs_gradient:
                with torch.enable_grad():
                    logits = self(x.detach().requires_grad_(), heads)
                return logits.detach()
            tracer = stack.enter_context(
                Tracer(
                    self.model,
                    heads=heads,
                    noise_free=self.noise_free,
                    relaxed=self.relaxed,
                    elementwise=self.elementwise,
                )
            )
            logits = tracer.restored(self.model(x))
            return logits


@dataclass(frozen=True)
class MembersView:
    """A function of the logits of an ensemble's members, whose gradients need no surrogate.

    One pass of the members serves all such views, and gives the ensemble's own logits.

    Args:
        model: a classifier whose net is the ensemble.
        entry: function from the members' logits (B N K) to logits (B K).
        is_straight_through: return the ensemble's own logits, with the gradient of `entry`.
    """

    model: Classifier
    entry: Substitute
    is_straight_through: bool = False

    def __call__(self, x: Images) -> Logits:
        """Return the logits of x."""
        return self.combined(members_and_output(self.model, x))

    def combined(self, outputs: Tensor) -> Logits:
        """Return the logits of outputs (B N+1 K): those of the members, then the ensemble's own."""
        logits = self.entry(outputs[:, :-1])
        return with_gradient_of(outputs[:, -1], logits) if self.is_straight_through else logits


@dataclass(frozen=True)
class HeadsView:
    """The logits that a model computes inside; those of several heads are combined by `entry`.

    Args:
        traced: the model.
        classes: K.
        count: number of heads.
        entry: function from the heads' logits (B N K) to logits (B K).
        is_straight_through: return the model's logits, with the gradient of `entry`.
    """

    traced: TracedModel
    classes: int
    count: int
    entry: Substitute
    is_straight_through: bool = False

    def __call__(self, x: Images) -> Logits:
        """Return the logits of x."""
        with torch.enable_grad():
            images = x if x.requires_grad else x.detach().requires_grad_()
            heads = Heads((len(x), self.classes))
            outputs = self.traced(images, heads)
        if len(heads.found) < self.count:
            raise RuntimeError(f"found {len(heads.found)} heads instead of {self.count}.")
        logits = self.entry(torch.stack(heads.found[: self.count], 1))
        logits = with_gradient_of(outputs, logits) if self.is_straight_through else logits
        return logits if torch.is_grad_enabled() and x.requires_grad else logits.detach()


@dataclass(frozen=True)
class FittedView:
    """A linear fit of a model's decisions on the features before its undifferentiable part; see `fitted`."""

    traced: TracedModel
    weights: Tensor

    def __call__(self, x: Images) -> Logits:
        """Return the logits of x."""
        features = self.traced.sources(x)
        logits = features @ self.weights.to(features)
        return logits if torch.is_grad_enabled() and x.requires_grad else logits.detach()


@dataclass(frozen=True)
class FrozenNoise:
    """A view with the same random numbers in every pass."""

    view: View

    def __call__(self, x: Images) -> Logits:
        """Return the logits of x."""
        with own_randomness("frozen"):
            return self.view(x)


@dataclass(frozen=True)
class MeanView:
    """The mean of a view over noisy copies of the images, and over its random draws.

    Args:
        view: the view.
        draws: number of passes.
        sigma: standard deviation of the input noise, in [0, 1] pixel units; 0 for none.
    """

    view: View
    draws: int = MEAN_DRAWS
    sigma: float = SIGMA

    @property
    def passes(self) -> int:
        """Passes through the model for one batch of logits."""
        return self.draws

    def __call__(self, x: Images) -> Logits:
        """Return the logits of x."""
        logits = [self.view(self._noisy(x)) for _ in range(self.draws)]
        return torch.stack(logits).mean(0)

    def _noisy(self, x: Images) -> Images:
        """Return a noisy copy in [0, 1]; clamped pixels keep a gradient."""
        if not self.sigma:
            return x
        return with_gradient_of((x + self.sigma * torch.randn_like(x)).clamp(0, 1), x)


class _Exported(nn.Module):
    """A callable that a net exports, as a module."""

    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)
