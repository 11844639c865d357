"""Gradient views: an unmasked net has none, a masked net has one with a useful gradient."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from masked_defenses import AROUND, Activation, Digits, KWinners, MaskedNet, StraightThroughSign
from torch import nn

from robustkit import load_data, load_model
from robustkit.core.criteria import Goal
from robustkit.core.rng import RowRng
from robustkit.core.threat import ThreatModel
from robustkit.gradient_views.tracer import Tracer
from robustkit.gradient_views.view_kinds import MeanView, TracedModel
from robustkit.gradient_views.views import views
from robustkit.models import as_classifier
from robustkit.models.classifier import Classifier
from robustkit.registry import make

COARSE = (
    *("jpeg", "resize-pad", "numpy-median", "bit-depth", "blunt", "thermometer", "one-hot", "lookup"),
    *("completed", "sparse-spectrum"),
)
# Random draws that cannot be removed: the mean over draws is the only view.
NOISY = ("numpy-noise",)
THREAT = ThreatModel.parse("linf:0.1")


@pytest.fixture(scope="module")
def net() -> Classifier:
    return load_model("robustkit:digits-cnn").eval()


@pytest.fixture(scope="module")
def images() -> tuple[torch.Tensor, torch.Tensor]:
    data = load_data("digits:test").head(24)
    return data.images(range(24)), torch.as_tensor(data.labels)


def test_an_unmasked_net_has_no_view(net: Classifier, images: tuple[torch.Tensor, torch.Tensor]) -> None:
    found = views(net, images[0])
    assert found == {}
    assert found.findings == ()


def slope(view: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    point = x.clone().requires_grad_()
    return torch.autograd.grad(Goal(labels).loss(view(point), "margin").sum(), point)[0].flatten(1)


@pytest.mark.parametrize("name", AROUND)
def test_the_view_of_a_masked_net_has_the_gradient_of_the_unmasked_net(
    name: str, net: Classifier, images: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Nearly; what is blurred or coarse has another, of which part is the same."""
    x, labels = images[0][:4], images[1][:4]
    found = views(as_classifier(MaskedNet(net, AROUND[name]).eval()), x)
    assert found
    restored = slope(net, x, labels)
    exact = {name: view for name, view in found.items() if name != "smooth"}
    if name in NOISY:
        exact["averaged"] = MeanView(TracedModel(as_classifier(MaskedNet(net, AROUND[name]).eval())), sigma=0.0)
    like = {
        name: float(F.cosine_similarity(slope(view, x, labels), restored).mean()) for name, view in exact.items()
    }
    assert max(like.values()) > (0.3 if name in COARSE else 0.6 if name in NOISY else 0.9), like


@pytest.mark.slow
@pytest.mark.parametrize("name", AROUND)
def test_attacks_on_the_view_of_a_masked_net_succeed(
    name: str, net: Classifier, images: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Within what 20 steps differ by, the worst over the views is the bare net's robust accuracy."""
    x, labels = images
    model = as_classifier(MaskedNet(net, AROUND[name]).eval())
    found = views(model, x)
    assert found
    rng = RowRng(0, "test", torch.arange(len(x)))
    fooled = torch.zeros(len(x), dtype=torch.bool)
    for view in found.values():
        points = make("pgd", steps=10, loss="margin")(view, x, Goal(labels), THREAT, rng=rng)
        with torch.no_grad():
            answers = torch.stack([model(points).softmax(1) for _ in range(8)]).mean(0)
        fooled |= answers.argmax(1) != labels
    restored = make("pgd", steps=10, loss="margin")(net, x, Goal(labels), THREAT, rng=rng)
    with torch.no_grad():
        truth = net(restored).argmax(1) != labels
    assert fooled.sum() >= truth.sum() - 2


@pytest.mark.parametrize("name", AROUND)
def test_views_have_the_outputs_of_the_model(
    name: str, net: Classifier, images: tuple[torch.Tensor, torch.Tensor]
) -> None:
    model = as_classifier(MaskedNet(net, AROUND[name]).eval())
    x = images[0][:2]
    answers = []
    for inside in (False, True):
        torch.manual_seed(0)
        np.random.seed(0)
        if inside:
            with Tracer(model):
                answers.append(model(x.clone().requires_grad_()).detach())
        else:
            answers.append(model(x.clone().requires_grad_()).detach())
    assert torch.equal(*answers)


def test_finding_views_changes_no_state(net: Classifier, images: tuple[torch.Tensor, torch.Tensor]) -> None:
    x = images[0]
    before = x.clone()
    for parameter in net.parameters():
        parameter.requires_grad_(True)
    model = as_classifier(MaskedNet(net, AROUND["jpeg"]).eval())
    hooks = [len(part._forward_hooks) for part in model.modules()]
    apply, numpy_in, inference = torch.autograd.Function.apply, torch.from_numpy, torch._C._InferenceMode
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    views(model, x)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]
    assert hooks == [len(part._forward_hooks) for part in model.modules()]
    assert torch.autograd.Function.apply == apply
    assert torch.from_numpy is numpy_in
    assert torch._C._InferenceMode is inference
    assert torch.is_grad_enabled()
    assert torch.equal(x, before)
    assert not x.requires_grad
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())


class Ensemble(nn.Module):
    """CrossMax over a net and shifted copies of it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def stacked(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.net(x + shift) for shift in (0.0, 0.02, -0.02)], 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stack = self.stacked(x)
        apart = stack - stack.amax(2, keepdim=True)
        return (apart - apart.amax(1, keepdim=True)).median(1).values


def test_an_ensemble_has_views_of_its_members(net: Classifier, images: tuple[torch.Tensor, torch.Tensor]) -> None:
    x = images[0]
    model = as_classifier(Ensemble(net).eval())
    found = views(model, x)
    assert {"mean-logit", "member-0", "straight-through", "soft-top-k"} <= found.keys()
    stack = model.net.stacked(x)
    with torch.no_grad():
        assert torch.allclose(found["mean-logit"](x), stack.mean(1), atol=1e-4)
        assert torch.allclose(found["member-1"](x), stack[:, 1], atol=1e-4)
    assert torch.equal(found["straight-through"](x.clone().requires_grad_()), model(x))
    assert "forward" not in model.net.__dict__


INSIDE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "sign": (lambda: Activation(torch.sign), "takes signs"),
    "steep-tanh": (lambda: Activation(lambda h: torch.tanh(1e4 * h)), "saturates"),
    "by-hand": (lambda: Activation(lambda h: h / (h.abs() + 1e-9)), "takes signs"),
    "exponential": (lambda: Activation(lambda h: 2 / (1 + torch.exp(-1e3 * h)) - 1), "bends"),
    "where": (lambda: Activation(lambda h: torch.where(h > 0, 1.0, -1.0)), "compares"),
    "clamped": (lambda: Activation(lambda h: (1e6 * h).clamp(-1, 1)), "clamps"),
    "straight-through": (lambda: Activation(StraightThroughSign.apply), "writes its own backward pass"),
    "rounded": (lambda: Activation(lambda h: h.relu().round()), "rounds"),
    **{how: (partial(KWinners, 0.2, how), "compares") for how in ("threshold", "where", "fill", "assign")},
    "scatter": (lambda: KWinners(0.2, "scatter"), "chooses"),
}


@pytest.mark.parametrize("name", INSIDE)
def test_operations_that_mask_gradients_are_found(name: str) -> None:
    make_one, what = INSIDE[name]
    model = as_classifier(Digits(make_one).eval())
    found = views(model, torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert "mended" in found
    assert what in {mend.what for mend in found.findings}
    assert any(mend.where.startswith("net.") for mend in found.findings)
    assert all(mend.remedy for mend in found.findings)


@pytest.mark.slow
def test_models_that_cannot_be_traced_have_no_view(images: tuple[torch.Tensor, torch.Tensor]) -> None:
    """A traced net runs where nobody sees it; one that raises has no views and breaks nothing."""
    import warnings

    x = images[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Digits().eval(), x)
    assert views(as_classifier(traced), x) == {}

    def shaky(z: torch.Tensor) -> torch.Tensor:
        if z.requires_grad:
            raise ValueError("no gradients here")
        return z.flatten(1)[:, :10]

    assert views(as_classifier(shaky), x) == {}


def test_views_that_a_net_exports_are_used(net: Classifier, images: tuple[torch.Tensor, torch.Tensor]) -> None:
    class Exporting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

        def views(self) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
            return {"tilted": lambda x: self.net(x.flip(3)), "broken": lambda x: x[0], "own": self.net}

    found = views(as_classifier(Exporting().eval()), images[0])
    assert "tilted" in found
    assert not {"broken", "own"} & found.keys()


@pytest.mark.parametrize("how", ["numpy", "torch"])
def test_nearest_neighbours_have_a_fitted_view(
    how: str, net: Classifier, images: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Their vote has no gradient, and what is made of the features is of another shape."""
    data = load_data("digits:train").head(200)
    labels = torch.as_tensor(data.labels)
    with torch.no_grad():
        bank = F.normalize(net(data.images(range(200))))

    def vote(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        like = F.normalize(net(x)) @ bank.T
        if how == "torch":
            near = like.topk(5).indices
        else:
            near = torch.from_numpy(np.argsort(-like.detach().numpy(), 1)[:, :5].copy())
        return F.one_hot(F.one_hot(labels[near], 10).sum(1).argmax(1), 10).float()

    x, true = images[0][:12], images[1][:12]
    model = as_classifier(MaskedNet(net, vote).eval())
    found = views(model, x)
    fitted = found["fitted"]
    assert torch.equal(fitted(x).argmax(1), model(x).argmax(1))
    assert torch.allclose(fitted(x[:1]), fitted(x)[:1], atol=1e-4)
    assert F.cosine_similarity(slope(fitted, x, true), slope(net, x, true)).mean() > 0.3
