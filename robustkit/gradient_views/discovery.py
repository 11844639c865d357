"""What may stand in for a model's gradients in a run, by the names that suites use, and what that tells of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from robustkit.core.isolation import own_randomness
from robustkit.core.shapes import Images
from robustkit.gradient_views.aggregator_substitutes import ensemble
from robustkit.gradient_views.views import Mended, Smooth, draws, views
from robustkit.models.classifier import Classifier
from robustkit.registry import DRAWN, VIEWS
from robustkit.runs.recorded_outputs import run_once

# Views that say nothing against a model's own gradients.
INNOCENT = {"smooth"}


@dataclass(frozen=True)
class GradientViews:
    """Views by the names of suites, each one or several, and in words the places that may hide gradients."""

    views: Mapping[str, Sequence[Callable[[Images], Tensor]]] = field(default_factory=dict)
    places: Sequence[str] = ()

    @property
    def doubtful(self) -> bool:
        """Whether attacks on the model's own gradients alone will not do."""
        return bool(self.views.keys() - INNOCENT)


def discover_views(model: Classifier, x: Images, random: bool) -> GradientViews:
    """Return what a model offers to climb on beside its own gradients, by the images x (B C H W)."""
    offer = views(model, x, random=random)
    sorted_in: dict[str, list[Callable[[Images], Tensor]]] = {}
    for name, view in offer.items():
        # Of a hand-written ensemble, and without its dice, the parts are called as those of a declared one.
        base = name.removeprefix("calm-").removeprefix("inner-")
        known = "members" if base.startswith("member-") else base
        sorted_in.setdefault(known if known in VIEWS else name if name in VIEWS else "own", []).append(view)
    part = ensemble(model)
    if part is not None:
        sorted_in["stack"] = [Stacked(model, part)]
    if random:
        means = {
            name: [_averaged(f"{name} {at}", view, x) for at, view in enumerate(sorted_in[name])]
            for name in DRAWN
            if name in sorted_in
        }
        drawn = {name: parts for name, parts in means.items() if any(isinstance(part, Smooth) for part in parts)}
        # The model itself is known to draw, though it may have answered alike for once.
        drawn["mended"] = [Smooth(view, sigma=0.0) for view in sorted_in.get("mended", [Mended(model)])]
        sorted_in |= {f"averaged-{name}": parts for name, parts in drawn.items()}
    places = {f"{mend.where or 'the model'} {mend.what}" for mend in offer.mends}
    return GradientViews(sorted_in, sorted(places))


def _averaged(name: str, view: Callable[[Images], Tensor], x: Images) -> Callable[[Images], Tensor]:
    """Return the mean of a view over draws; the view where it draws nothing."""
    with own_randomness("averaged"):
        return Smooth(view, sigma=0.0) if run_once(f"draws of {name}", lambda: draws(view, x)) else view


def is_applicable(view: str, views: Collection[str], suite: Collection[str]) -> bool:
    """Return whether a model has the view, and the views that a suite attacks do not have its mean over draws."""
    mean = f"averaged-{view}"
    return not view or (view in views and not (mean in views and mean in suite))


@dataclass(frozen=True)
class Stacked:
    """The predictors' logits (B N K) of an ensemble, side by side."""

    model: Classifier
    part: nn.Module

    def __call__(self, x: Images) -> Tensor:
        """Return the logits of x."""
        seen: list[Tensor] = []

        def keep(stack: Tensor, *_: Any) -> Tensor:
            seen.append(stack)
            return stack.mean(1)

        Mended(self.model, part=self.part, entry=keep)(x)
        if not seen:
            return torch.zeros(len(x), 1, self.model.num_classes or 2, device=x.device)
        return seen[-1]
