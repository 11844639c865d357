"""Indicators of attack failure: worked values and properties; planted adversarial points; lints of a model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nets import Flat, Small

from robustkit.attack_api.driver import trace_attack
from robustkit.checks import indicators, lints
from robustkit.checks.binarization import (
    Binarization,
    _direction,
    binarization,
    binary_problems,
    edge,
    features,
    fitted,
    heads,
)
from robustkit.core.criteria import Goal
from robustkit.core.errors import UsageError
from robustkit.core.rng import RowRng
from robustkit.core.threat import ThreatModel
from robustkit.registry import make

THREAT = ThreatModel.parse("linf:0.1")


def rows(n: int) -> RowRng:
    return RowRng(0, "test", torch.arange(n))


def test_incomplete_optimisation_by_its_worked_values() -> None:
    """Losses fall in the paper and rise here, so its paths are turned over."""
    paths = -torch.tensor(
        [
            [4.0, 3, 2, *[1] * 12],
            [float(14 - step) for step in range(15)],
            [1, 0.2, *[0.9] * 13],
            [2.0] * 15,
        ]
    )
    assert indicators.incomplete(paths).tolist() == [False, True, False, False]
    assert indicators.incomplete(3 * paths - 7).tolist() == [False, True, False, False]
    assert not indicators.incomplete(torch.tensor([[5.0]])).any()


def test_measuring_the_path_does_not_change_it() -> None:
    path = torch.rand(3, 15)
    before = path.clone()
    indicators.incomplete(path)
    assert torch.equal(path, before)


def test_instability_by_its_worked_values() -> None:
    loss = torch.tensor([2.0, 0.001, 0.0, 5.0])
    around = torch.tensor([[1.0, 0.011, 0.0, 5.0], [3.0, -0.009, 0.0, 5.0]])
    assert torch.allclose(indicators.unstable(loss, around), torch.tensor([0.5, 1.0, 0.0, 0.0]))
    assert torch.allclose(indicators.unstable(7 * loss, 7 * around), torch.tensor([0.5, 1.0, 0.0, 0.0]))
    assert not torch.allclose(indicators.unstable(loss + 1, around + 1), torch.tensor([0.5, 1.0, 0.0, 0.0]))


def test_width_zero_measures_model_noise_only() -> None:
    net, x = Small(1), torch.rand(4, 1, 8, 8)
    goal = Goal(torch.arange(4))
    for noise, shown in ((0.0, False), (0.1, True)):

        def loss(images: torch.Tensor, noise: float = noise) -> torch.Tensor:
            return goal.loss(net(images + noise * torch.rand_like(images)), "margin")

        points = indicators.nearby(x, rows(4), draws=5, rho=0.0)
        around = torch.stack([loss(images).detach() for images in points])
        assert bool((indicators.unstable(loss(x).detach(), around) > 0).all()) is shown


def test_silent_successes_are_iterates_that_fooled_the_model_and_were_not_returned() -> None:
    fooled = torch.tensor([[0, 1, 0], [0, 0, 0], [0, 1, 1], [0, 0, 1]]).bool()
    assert indicators.silent(fooled).tolist() == [True, False, False, False]


def test_an_unmasked_net_and_a_sound_attack_raise_no_indicator() -> None:
    net, x = Flat(), torch.rand(8, 1, 8, 8)
    labels = net(x).argmax(1)
    attack, goal = make("pgd", steps=60, loss="margin"), Goal(labels)
    trace = trace_attack(attack, net, x, goal, THREAT, rows(8))
    assert trace.losses.shape == trace.fooled.shape == (8, 61)
    assert not indicators.incomplete(trace.losses).any()
    everywhere = trace_attack(attack, net, x, goal, ThreatModel.parse("linf:1"), rows(8))
    assert everywhere.fooled.any(1).all()
    blind = trace_attack(attack, lambda images: 0 * net(images) + net(x).detach(), x, goal, THREAT, rows(8))
    assert not blind.fooled.any()


@pytest.mark.parametrize("threat", ["linf:0.1", "l2:0.5", "l1:4"])
def test_planted_adversarial_points_fool_the_model(threat: str) -> None:
    rules, net, x = ThreatModel.parse(threat), Small(1), torch.rand(5, 1, 9, 7)
    ends, width = heads(net, net, x[:1])
    assert width == 32
    question = binary_problems(net, ends, x, rules, rows(5), inner=19)
    assert rules.contains(question.witness, x).all()
    assert np.allclose(rules.distance(question.witness, x), float(rules.eps), atol=1e-6)
    with torch.no_grad():
        assert (question.logits(features(net, ends, question.witness)).argmax(1) == 1).all()
        assert (question.logits(features(net, ends, x)).argmax(1) == 0).all()
    assert len(edge(x, rules, rows(5))) == 5


def test_planting_at_inseparable_features_is_refused() -> None:
    inside = torch.rand(2, 10, 4)
    with pytest.raises(UsageError, match="2 of 2 planted points"):
        fitted(inside, inside[:, 0])
    with pytest.raises(UsageError, match="no linear layer"):
        heads(torch.nn.Flatten(), torch.nn.Flatten(), torch.rand(1, 1, 2, 2))


def test_the_fitted_boundary_separates_the_planted_points() -> None:
    inside, planted = torch.randn(3, 10, 16), torch.randn(3, 16)
    for tight in (False, True):
        weight, bias = fitted(inside, planted, tight)
        assert ((planted * weight).sum(1) + bias > 0).all()
        assert ((inside @ weight[:, :, None])[:, :, 0] + bias[:, None] < 0).all()


def test_the_direction_is_fishers_for_any_number_of_features() -> None:
    rows, point = torch.randn(2, 10, 30, dtype=torch.float64), torch.randn(2, 1, 30, dtype=torch.float64)
    rows = rows - rows.mean(1, keepdim=True)
    scatter = rows.mT @ rows / 10 + 1e-3 * torch.eye(30, dtype=torch.float64)
    fisher = torch.linalg.solve(scatter, point.mT)[:, :, 0]
    torch.testing.assert_close(_direction(rows, point), fisher / fisher.norm(dim=1, keepdim=True))
    weight, _ = fitted(torch.randn(2, 20, 90_000), torch.randn(2, 90_000))
    assert weight.isfinite().all()


def test_too_many_features_raise_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustkit.checks.binarization.MAX_FEATURES", 31)
    net, x = Small(1), torch.rand(1, 1, 8, 8)
    with pytest.raises(UsageError, match="32 features of an image are too many"):
        binarization(net, net, x, make("pgd"), THREAT, rng=rows(1))


def test_a_strong_attack_passes_and_a_weak_one_fails() -> None:
    net, x = Small(1), torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    good = binarization(net, net, x, make("pgd", steps=30, loss="margin"), THREAT, rng=rows(8), inner=29)
    assert good.verdict == "pass"
    feeble = binarization(net, net, x, make("pgd", steps=1, step_size="0.01eps"), THREAT, rng=rows(8), inner=29)
    assert feeble.verdict == "fail"
    assert feeble.rate < 0.5
    again = binarization(net, net, x, make("pgd", steps=30, loss="margin"), THREAT, rng=rows(8), inner=29)
    assert again == good


def test_verdict_of_the_planting_test() -> None:
    assert Binarization(1.0, 0.6, 10).verdict == "too easy"
    assert Binarization(0.94, 0.0, 10).verdict == "fail"
    assert Binarization(0.95, 0.5, 10).verdict == "pass"


def test_each_fault_of_logits_and_gradients_has_its_light() -> None:
    logits, labels = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.zeros(6).long()
    gradient = torch.rand(6, 1, 3, 3)

    def lights(z: torch.Tensor, one: torch.Tensor = gradient, other: torch.Tensor = gradient) -> set[str]:
        return {lint.code for lint in lints.lints(z, labels, one, other) if lint.light != "green"}

    assert lights(logits) == set()
    assert lights(logits.softmax(1)) == {"probabilities"}
    assert lights(logits.log_softmax(1)) == {"zero-masking"}
    sure = logits.clone()
    sure[:, 0] = 100
    assert lights(sure) == {"ce-saturated"}
    assert lights((1e4 * logits).softmax(1).clamp(min=1e-6).log()) >= {"underflow", "zero-masking"}
    assert lights(torch.ones(6, 5)) == {"dlr-flat"}
    assert lights(logits, 0 * gradient, 0 * gradient) == {"zero-gradient"}
    assert lights(logits, gradient, -gradient) == {"unlike-gradients"}
