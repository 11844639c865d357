"""Masked defenses that the default suite breaks, and unmasked nets that raise no flag."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from masked_defenses import AROUND, Activation, AggregatedNets, Digits, KWinners, MaskedNet, crossmax, trained
from torch import Tensor, nn

from robustkit import evaluate, load_data
from robustkit.runs.evaluation_record import Report

pytestmark = pytest.mark.slow

THREAT, IMAGES = "linf:0.08", 24
# What a report says where AutoAttack's number is too high, or cannot be had.
TOLD = {
    "masked-gradient",
    "no-gradient",
    "randomised",
    "saturated-softmax",
    "score-beats-gradient",
    "survives-any-eps",
    "unlike-gradients",
    "vanishing-gradient",
    "wrong-gradient",
    "zero-gradient",
}
MASKING = {"masked-gradient", "score-beats-gradient", "wrong-gradient", "zero-gradient", "vanishing-gradient"}


@cache
def digits(split: str) -> tuple[Tensor, Tensor]:
    data = load_data(f"digits:{split}")
    return data.images(range(len(data))), torch.from_numpy(data.labels)


@cache
def plain(seed: int = 0, attack: float = 0.0) -> nn.Module:
    return trained(Digits(seed=seed), *digits("train"), attack=attack, seed=seed)


def judged(model: nn.Module, suite: str) -> Report:
    x, y = digits("test")
    return evaluate(model, x[:IMAGES], y[:IMAGES], THREAT, suite=suite)


@cache
def robust_without_mask() -> int:
    """How many images the bare net withstands."""
    return sum(verdict.robust for verdict in judged(plain(), "rapid").verdicts)


def flag_codes(report: Report) -> set[str]:
    return {flag.code for flag in report.flags}


@pytest.mark.parametrize("name", AROUND)
def test_no_masked_defense_appears_more_robust_than_the_unmasked_net(name: str) -> None:
    defense = MaskedNet(plain(), AROUND[name])
    found = judged(defense, "auto")
    robust = sum(verdict.robust for verdict in found.verdicts)
    # An image is 4 points; what a mask changes in the image itself may save or cost one.
    assert robust <= robust_without_mask() + 1
    if not flag_codes(found) & TOLD:
        published = judged(defense, "autoattack")
        assert sum(verdict.robust for verdict in published.verdicts) <= robust + 1


@pytest.mark.parametrize("how", ["threshold", "scatter", "where", "fill", "assign"])
def test_k_winners_activations_add_no_apparent_robustness(how: str) -> None:
    """Trained with the mask, so that no bare net tells the truth; the direct attack must not be the lower one."""
    defense = trained(Digits(lambda: KWinners(how=how)), *digits("train"))
    found = judged(defense, "auto")
    direct = judged(defense, "apgd(loss=ce),apgd(loss=dlr)")
    assert found.robust_accuracy.value <= direct.robust_accuracy.value
    assert found.robust_accuracy.value <= robust_without_mask() / IMAGES
    assert found.robust_accuracy.value == direct.robust_accuracy.value or flag_codes(found) & TOLD


def test_crossmax_is_no_more_robust_than_the_mean() -> None:
    nets = [plain(seed) for seed in range(5)]
    found = judged(AggregatedNets(nets, crossmax), "auto")
    mean = judged(AggregatedNets(nets, lambda stack: stack.mean(1)), "rapid")
    assert found.robust_accuracy.value <= mean.robust_accuracy.value + 1 / IMAGES
    assert flag_codes(found) & TOLD


def test_a_steep_activation_and_stochastic_depth_add_no_apparent_robustness() -> None:
    steep = trained(Digits(), *digits("train"))
    steep.act1 = steep.act2 = Activation(lambda z: torch.relu(z) + 0.05 * torch.tanh(1e4 * z))
    skipping: Any = trained(Digits(), *digits("train"))
    skipping.skip = 0.7
    for defense in (steep, skipping):
        assert sum(verdict.robust for verdict in judged(defense, "auto").verdicts) <= robust_without_mask() + 1


@pytest.mark.parametrize("kind", ["plain", "adversarially trained", "mean of five"])
def test_an_unmasked_net_raises_no_flag(kind: str) -> None:
    net = {
        "plain": plain,
        "adversarially trained": lambda: plain(attack=0.08),
        "mean of five": lambda: AggregatedNets([plain(seed) for seed in range(5)], lambda stack: stack.mean(1)),
    }[kind]()
    found = judged(net, "auto")
    assert not flag_codes(found) & MASKING
    assert found.robust_accuracy.value == judged(net, "rapid").robust_accuracy.value
