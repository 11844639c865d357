"""Which check raises which flag for which model; the run's own attack is checked, randomised models by draws."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from nets import Small, labelled

from robustkit import evaluate
from robustkit.checks import gradients, outputs, signs, strength
from robustkit.checks.probe import Probe
from robustkit.checks.run import BEFORE_ATTACKS, DOUBTS
from robustkit.core.flags import Flag
from robustkit.core.threat import ThreatModel
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.models import as_classifier
from robustkit.registry import parse_suite
from robustkit.reporting.html.trust import CLAIMS
from robustkit.runs.report_parts import Rate, Stage


def probe(
    net: torch.nn.Module,
    suite: str = "apgd(loss=ce,steps=20,restarts=1)",
    threat: str = "linf:0.1",
    teacher: torch.nn.Module | None = None,
) -> Probe:
    """A look at a net that is right on all images, or as right as its teacher's labels are for it."""
    rules = ThreatModel.parse(threat)
    x, labels = labelled(teacher or net, 16, (1, 9, 7))
    attacks = [entry.attack for entry in parse_suite(suite, rules.norm)]
    return Probe(
        InstrumentedModel(as_classifier(net.eval()), torch.device("cpu")), x, labels, rules, attacks, 0, net
    )


class Perturbed(torch.nn.Module):
    """The small net with something done to its image and to its logits."""

    def __init__(self, before=lambda x: x, after=lambda z: z) -> None:
        super().__init__()
        self.net, self.before, self.after = Small(1), before, after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.net(self.before(x)))


def levels(flags: Sequence[Flag]) -> dict[str, str]:
    return {flag.code: flag.level for flag in flags}


def test_the_strongest_attack_is_the_longest_single_gradient_attack() -> None:
    suite = "pgd(steps=9),apgd(loss=dlr,steps=90),apgd-t(steps=80),apgd(loss=ce,steps=30),square(queries=99)"
    attack = probe(Small(1), suite).strongest
    assert (attack.info.name, attack.steps, attack.loss) == ("apgd", 30, "ce")
    assert probe(Small(1), "square(queries=9),autoattack:apgd-ce(steps=2)").strongest is None


def test_a_weak_attack_raises_attack_not_alive() -> None:
    good, feeble = (
        signs.finds_planted_points(probe(Small(1), suite))
        for suite in ("pgd(steps=30)", "pgd(steps=1,step_size=0.01eps)")
    )
    assert (good.level, good.value) == ("ok", 8)
    assert feeble.level == "warning"
    assert feeble.value < 5


def test_planting_that_is_impossible_is_not_measured() -> None:
    noisy, headless = Perturbed(lambda x: x + 0.05 * torch.randn_like(x)), Perturbed()
    headless.net.body[-1] = torch.nn.Sequential(
        torch.nn.Unflatten(1, (32, 1, 1)), torch.nn.Conv2d(32, 10, 1), torch.nn.Flatten()
    )
    for case, word in (
        (probe(noisy, teacher=Small(1)), "random"),
        (probe(Small(1), threat="linf:0"), "eps 0"),
        (probe(Small(1), threat="l1:2"), "l1"),
        (probe(Small(1), "square(queries=9)"), "no row-wise attack"),
        (probe(headless), "no linear layer"),
    ):
        flag = signs.finds_planted_points(case)
        assert flag.level == "not measured"
        assert word in flag.meaning


def test_a_net_without_a_gradient_raises_attack_not_alive() -> None:
    flag = signs.finds_planted_points(probe(Perturbed(torch.Tensor.detach)))
    assert (flag.level, flag.value) == ("warning", 0)


def test_an_unstable_loss_and_a_random_backward_pass() -> None:
    assert signs.unstable(probe(Small(1))).level == "ok"
    assert signs.unstable(probe(Perturbed(after=lambda z: (1e5 * z).sin()))).level == "warning"

    class RandomBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, gradient):
            return torch.randn_like(gradient)

    assert gradients.unlike(probe(Small(1))) is None
    assert gradients.unlike(probe(Perturbed(RandomBackward.apply))).code == "unlike-gradients"


def test_underflow_and_dlr_flat_on_tied_logits() -> None:
    assert outputs.underflow(probe(Small(1))) is outputs.dlr_flat(probe(Small(1))) is None
    floor = Perturbed(after=lambda z: (9 * z).softmax(1).clamp(min=1e-3).log())
    assert outputs.underflow(probe(floor)).code == "underflow"
    assert outputs.dlr_flat(probe(Perturbed(after=lambda z: z.clamp(max=-99)))).code == "dlr-flat"


def test_a_randomised_model_is_checked_by_the_majority_of_draws() -> None:
    """A wrong draw on the way, where right ones are as many, is no sign that it falls; noise is no mask."""
    torch.manual_seed(0)
    coin = Perturbed(after=lambda z: z.detach() * (2 * (torch.rand(len(z), 1) < 0.8) - 1))
    randomised = probe(coin, teacher=Small(1))
    flag = strength.robust_at_any_eps(randomised)
    assert flag.level == "warning"
    assert flag.value > 0.8 * len(randomised.correct_rows) > 5
    noisy = probe(Perturbed(lambda x: x + 0.05 * torch.randn_like(x)), teacher=Small(1))
    assert strength.robust_at_any_eps(noisy).level == "ok"
    assert strength.unconverged(noisy).level == signs.incomplete(noisy).level == "not measured"


@pytest.mark.parametrize("masked", [False, True])
def test_a_run_records_passed_checks_and_raised_flags(masked: bool) -> None:
    net = Perturbed(lambda x: (8 * x).round() / 8) if masked else Small(1)
    report = evaluate(net, *labelled(net, 16, (1, 9, 7)), "linf:0.05", suite="pgd(steps=20)")
    against, of_itself = levels(report.flags), levels(report.passed)
    assert not set(against) & set(of_itself)
    assert set(of_itself) <= set(CLAIMS)
    assert of_itself["score-beats-gradient"] == of_itself["masked-gradient"] == "not measured"
    signs_of_masks = {"zero-gradient", "survives-any-eps"}
    if masked:
        assert set(against) >= signs_of_masks
        assert of_itself.get("attack-not-alive") != "ok"
    else:
        assert against == {}
        measured = {code for code, level in of_itself.items() if level == "ok"}
        assert measured >= signs_of_masks | {"unstable-loss", "silent-success", "incomplete-optimisation"}
        assert measured >= {"attack-not-alive", "not-converged", "wrong-gradient"}


def test_masked_gradient_needs_an_attack_on_the_own_gradient() -> None:
    """What a view fools first tells nothing of what the model's own gradients would have missed."""
    stages = [Stage(name, Rate.of(9 - fooled, 10), fooled, 9, 9, 1.0) for name, fooled in (("a", 1), ("b", 8))]

    def flag(access: list[str], views: list[str]) -> Flag:
        return strength.masked(stages, access, views, ["a place"])

    assert flag(["gradient", "gradient"], ["", "members"]).raised
    for access, views in ((["gradient"] * 2, ["members", ""]), (["score", "gradient"], ["", "members"])):
        assert flag(access, views).level == "not measured"
        assert "came before" in flag(access, views).meaning


def test_every_claim_belongs_to_a_known_flag() -> None:
    """Doubts that escalate are flags of checks; each check that measures has its line on the page."""
    assert {signs.unstable, signs.silent, signs.incomplete, signs.finds_planted_points, gradients.unlike} <= set(
        BEFORE_ATTACKS
    )
    assert {"attack-not-alive", "unstable-loss", "unlike-gradients", "underflow"} <= DOUBTS
