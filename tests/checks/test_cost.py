"""The checks are short for a net with useful gradients, and long where a short check finds a sign of a mask."""

from __future__ import annotations

from typing import cast

import torch

from robustkit import load_data, load_model
from robustkit.attack_api import Answer
from robustkit.checks.pgd_runs import short_runs
from robustkit.checks.probe import Probe
from robustkit.checks.run import diagnose
from robustkit.core.isolation import evaluation_mode, own_randomness
from robustkit.core.threat import ThreatModel
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.models import as_classifier
from robustkit.registry import parse_suite


class FewPixels(torch.autograd.Function):
    """The identity with a gradient in a tenth of the pixels, others at each point."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        generator = torch.Generator().manual_seed(int(x.double().sum() * 1e6))
        return gradient * (torch.rand(gradient.shape, generator=generator) < 0.1)


def probe(change=lambda x: x) -> Probe:
    """Return a probe of the built-in net of digits with something done to its images."""
    net, samples = load_model("robustkit:digits-cnn"), load_data("digits:test").head(64)
    model = as_classifier(lambda x: net(change(x)))
    attacks = [entry.attack for entry in parse_suite("auto", "linf") if not entry.view]
    return Probe(
        InstrumentedModel(model, torch.device("cpu")),
        samples.images(range(64)),
        torch.from_numpy(samples.labels),
        ThreatModel.parse("linf:0.1"),
        attacks,
        net=net,
    )


def test_the_checks_of_an_unmasked_net_take_at_most_300_passes() -> None:
    case = probe()
    with evaluation_mode(cast("torch.nn.Module", case.net)), own_randomness(0):
        assert not [flag for flag in diagnose(case) if flag.raised]
    assert not case.suspicious
    assert isinstance(case.model, InstrumentedModel)
    assert case.model.forwards + case.model.backwards <= 300


def test_short_runs_on_a_slow_gradient_do_not_settle_whether_more_steps_help() -> None:
    settled = []
    for change in (lambda x: x, FewPixels.apply):
        case = probe(change)
        with evaluation_mode(cast("torch.nn.Module", case.net)), own_randomness(0):
            rows = case.correct_rows[:12]
            clean = Answer(case.logits[rows], case.clean.loss[rows], case.gradients[:12])
            settled.append(short_runs(case.model, case.rows(case.threat, rows), clean).settled)
            if change is FewPixels.apply:
                assert case.suspicious
                assert case.pgd_runs.steps == 40
    assert settled == [True, False]


def test_a_share_near_its_limit_is_measured_on_all_images() -> None:
    """Of the first 32 images 24 are saturated, which is the limit; of all 64 it is 51."""
    x = torch.rand(64, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    x[:, 0, 0, 0] = ((torch.arange(64) % 4 != 0) | (torch.arange(64) > 50)).float()
    head = torch.tensor([1.0] + [0.0] * 15)

    def call(images: torch.Tensor) -> torch.Tensor:
        sure = images.flatten(1) @ head
        return torch.stack([1 + 99 * sure, 0.1 * images.flatten(1).sum(1) - 2], 1)

    model = InstrumentedModel(as_classifier(call), torch.device("cpu"))
    flags = diagnose(Probe(model, x, call(x).argmax(1), ThreatModel.parse("linf:0.1")))
    assert "saturated-softmax" in {flag.code for flag in flags if flag.raised}
