"""Views of a model: differentiable substitutes that attacks search on.

The adversarial images are verified on the model itself.

They have three sources. The model exports them: `net.views()`, a dict of named callables on the net's normalised
inputs, or `twin(model, x)` of a defense, a differentiable version of its call. The model is an ensemble: a
module with `stacked(x) -> (B N K)` gets another aggregator (`aggregator_substitutes`). Or one traced forward pass
(`tracer`) shows where gradients stop, logits inside the model (`heads`), and random draws.

A view is left out if it raises an error, has no finite gradient, or has the same gradient as the model. So a
plain net has none.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from robustkit.core.isolation import own_randomness
from robustkit.core.shapes import Images, Logits
from robustkit.gradient_views.aggregator_substitutes import (
    combined_by,
    find_ensemble,
    mean_logit,
    single_member,
    substitutes,
)
from robustkit.gradient_views.comparison import MembersPass, are_parallel, gradients_of, members_pass
from robustkit.gradient_views.findings import Finding
from robustkit.gradient_views.fitted import fit
from robustkit.gradient_views.heads import Heads
from robustkit.gradient_views.tracer import Tracer
from robustkit.gradient_views.view_kinds import (
    MEAN_DRAWS,
    FittedView,
    FrozenNoise,
    HeadsView,
    MeanView,
    MembersView,
    TracedModel,
    View,
    _Exported,
)
from robustkit.models.classifier import Classifier
from robustkit.runs.recorded_outputs import run_once

# The most images that views are compared on.
MAX_IMAGES = 16
# Logits that differ by more, relative to the largest, are random.
NOISE_TOLERANCE = 1e-4


class Views(dict[str, View]):
    """Views by name; `findings` lists the places that hide gradients."""

    findings: tuple[Finding, ...] = ()


def views(model: Classifier, x: Images, *, random: bool = False) -> Views:
    """Return the views of a classifier that are worth attacking.

    Model, generators and gradients are not changed. It costs some tens of forward and backward passes over the
    first 16 images.

    Args:
        model: the classifier.
        x: images (B C H W) in [0, 1].
        random: whether the model is known to be random; otherwise the logits of two passes are compared.
    """
    x = x[:MAX_IMAGES].detach()
    with own_randomness("views"), _frozen_parameters(model):
        found = Views()
        logits = run_once("model", lambda: _outputs(model, x).cpu()).to(x.device)
        random = random or run_once("draws", lambda: is_random(model, x, repeats=1))
        labels = logits.argmax(1)
        own = run_once("slopes", lambda: gradients_of(model, x, labels))
        kept = [] if own is None else [own]
        trace = _trace(model, x)
        elementwise = () if trace is None else tuple(trace.elementwise)
        random = random or (trace is not None and trace.has_randomness)
        traced = TracedModel(model, elementwise=elementwise)
        members = None if random else members_pass(traced, x, labels)
        for name, view in _candidates(traced, x, members, random, own is None):
            gradients = run_once(name, partial(gradients_of, view, x, labels, members))
            if gradients is None or any(are_parallel(gradients, other) for other in kept):
                continue
            found[name] = view
            kept.append(gradients)
        if found:
            inner = (view for name, view in found.items() if name.startswith("inner-"))
            found["smooth"] = MeanView(next(inner, TracedModel(model, elementwise=elementwise)))
            found.findings = tuple(trace.found) if trace is not None else ()
    return found


def _candidates(
    traced: TracedModel, x: Images, members: MembersPass | None, random: bool, hidden: bool
) -> Iterator[tuple[str, View]]:
    """Yield candidate views by name; `hidden` is whether the model has no gradient, which adds a fitted view."""
    model = traced.model
    exported = getattr(model.net, "views", None)
    if callable(exported):
        for name, call in exported().items():
            yield name, model.with_net(_Exported(call))
    if any(hasattr(defense, "twin") for defense in model.defenses):
        copied = copy.copy(model)
        copied.defenses = tuple(getattr(defense, "twin", defense) for defense in model.defenses)
        yield "twin", TracedModel(copied)
    part = find_ensemble(model)
    if members is not None:
        for name, substitute in substitutes(members.outputs.shape[1] - 1).items():
            yield name, MembersView(model, substitute)
        yield "straight-through", MembersView(model, mean_logit, is_straight_through=True)
    elif part is not None:
        for name, substitute in substitutes(_count_predictors(model, part, x)).items():
            yield name, replace(traced, part=part, entry=substitute)
        yield "straight-through", replace(traced, part=part, entry=mean_logit, is_straight_through=True)
    yield "mended", traced
    yield "loosened", replace(traced, relaxed=True)
    if random:
        yield "calm", replace(traced, noise_free=True)
        yield "frozen", FrozenNoise(traced)
    yield from _head_views(traced, x, members)
    if hidden:
        with suppress(RuntimeError):
            yield "fitted", FittedView(traced, run_once("fitted", lambda: fit(traced.sources, model, x).cpu()))
    if random:
        yield from ((f"calm-{name}", view) for name, view in _head_views(replace(traced, noise_free=True), x))


def _count_predictors(model: Classifier, part: nn.Module, x: Images) -> int:
    """Return the number of predictors of an ensemble."""
    counts: list[int] = []

    def record(stack: Tensor) -> Tensor:
        counts.append(stack.shape[1])
        return stack.mean(1)

    with torch.no_grad(), combined_by(part, record):
        model(x[:2])
    return counts[0] if counts else 0


def _head_views(traced: TracedModel, x: Images, members: MembersPass | None = None) -> Iterator[tuple[str, View]]:
    """Yield views of the logits inside the model, if there are any; several heads are combined in several ways.

    Heads that are the members of an ensemble have been combined already.
    """
    shape = _outputs(traced, x).shape
    heads = Heads(tuple(shape))
    try:
        with torch.enable_grad():
            traced(x.clone().requires_grad_(), heads)
    except Exception:
        return
    count = len(heads.found)
    if members is not None and members.are(heads.found):
        return
    if count == 1:
        yield "inner-logits", HeadsView(traced, shape[1], 1, single_member(0))
    elif count > 1:
        for name, substitute in substitutes(count).items():
            yield f"inner-{name}", HeadsView(traced, shape[1], count, substitute)
        yield "inner-straight-through", HeadsView(traced, shape[1], count, mean_logit, is_straight_through=True)


def _trace(model: Classifier, x: Images) -> Tracer | None:
    """Return the trace of a forward pass; None if it raises an error."""
    try:
        with torch.enable_grad(), Tracer(model, record_modules=True) as tracer:
            model(x.clone().requires_grad_())
    except Exception:
        return None
    return tracer


def _outputs(view: View, x: Images) -> Logits:
    with torch.no_grad():
        return view(x)


def is_random(view: View, x: Images, repeats: int = MEAN_DRAWS) -> bool:
    """Return whether the logits of x (B C H W) differ between passes by more than rounding.

    Args:
        view: the view.
        x: images (B C H W).
        repeats: how many further passes are compared with the first.
    """
    first = _outputs(view, x)
    tolerance = NOISE_TOLERANCE * first.abs().max()
    return any(bool((_outputs(view, x) - first).abs().max() > tolerance) for _ in range(repeats))


@contextmanager
def _frozen_parameters(model: nn.Module) -> Iterator[None]:
    """Disable the parameters' gradients inside the context, so only functions of the images have one."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
