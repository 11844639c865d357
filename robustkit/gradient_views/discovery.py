"""The gradient views of a model in a run, by the names that suites use."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from robustkit.core.isolation import own_randomness
from robustkit.core.shapes import Images
from robustkit.gradient_views.aggregator_substitutes import find_ensemble
from robustkit.gradient_views.view_kinds import MeanView, TracedModel
from robustkit.gradient_views.views import is_random, views
from robustkit.models.classifier import Classifier
from robustkit.registry import DRAWN, VIEWS
from robustkit.runs.recorded_outputs import run_once

# Views that are no sign of hidden gradients.
HARMLESS = {"smooth"}


@dataclass(frozen=True)
class GradientViews:
    """Views of a model.

    Args:
        views: one or several views by the names that suites use.
        places: descriptions of the places that may hide gradients.
    """

    views: Mapping[str, Sequence[Callable[[Images], Tensor]]] = field(default_factory=dict)
    places: Sequence[str] = ()

    @property
    def doubtful(self) -> bool:
        """Whether attacks on the model's own gradients are not enough."""
        return bool(self.views.keys() - HARMLESS)


def discover_views(model: Classifier, x: Images, random: bool) -> GradientViews:
    """Return the views that attacks can use in place of a model's own gradients.

    Args:
        model: the classifier.
        x: images (B C H W) in [0, 1] to examine it with.
        random: whether its logits are random.
    """
    views_found = views(model, x, random=random)
    by_name: dict[str, list[Callable[[Images], Tensor]]] = {}
    for name, view in views_found.items():
        # Heads inside a hand-written ensemble, with or without noise, get the names of a declared ensemble's
        # members.
        base = name.removeprefix("calm-").removeprefix("inner-")
        known = "members" if base.startswith("member-") else base
        by_name.setdefault(known if known in VIEWS else name if name in VIEWS else "own", []).append(view)
    part = find_ensemble(model)
    if part is not None:
        by_name["stack"] = [MemberLogits(model, part)]
    if random:
        means = {
            name: [_averaged(f"{name} {number}", view, x) for number, view in enumerate(by_name[name])]
            for name in DRAWN
            if name in by_name
        }
        drawn = {name: parts for name, parts in means.items() if any(isinstance(part, MeanView) for part in parts)}
        # The model is known to be random, even if two of its outputs were equal.
        drawn["mended"] = [MeanView(view, sigma=0.0) for view in by_name.get("mended", [TracedModel(model)])]
        by_name |= {f"averaged-{name}": parts for name, parts in drawn.items()}
    places = {f"{finding.where or 'the model'} {finding.what}" for finding in views_found.findings}
    return GradientViews(by_name, sorted(places))


def _averaged(name: str, view: Callable[[Images], Tensor], x: Images) -> Callable[[Images], Tensor]:
    """Return the mean of a view over its random draws; the view itself if it is not random."""
    with own_randomness("averaged"):
        return MeanView(view, sigma=0.0) if run_once(f"draws of {name}", lambda: is_random(view, x)) else view


def is_applicable(view: str, views: Collection[str], suite: Collection[str]) -> bool:
    """Return whether a suite attacks a view: the model has it, and the suite does not attack its mean over draws.

    Args:
        view: name of the view; empty for the model itself.
        views: names of the model's views.
        suite: names of the views in the suite.
    """
    mean = f"averaged-{view}"
    return not view or (view in views and not (mean in views and mean in suite))


@dataclass(frozen=True)
class MemberLogits:
    """The stacked logits (B N K) of an ensemble's predictors."""

    model: Classifier
    part: nn.Module

    def __call__(self, x: Images) -> Tensor:
        """Return the logits (B N K) of x."""
        stacks: list[Tensor] = []

        def keep(stack: Tensor, *_: Any) -> Tensor:
            stacks.append(stack)
            return stack.mean(1)

        TracedModel(self.model, part=self.part, entry=keep)(x)
        if not stacks:
            return torch.zeros(len(x), 1, self.model.num_classes or 2, device=x.device)
        return stacks[-1]
