"""The light attack over posteriors: golden numbers, and properties L1-L12 of the paper's attack.

The golden numbers were made by a loop written from the paper (UAI 2022, arXiv:2011.05074), in float64, with the
samples in the order 1, 2, 3, 1, …
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
from test_cwa import (
    EPS,
    GOAL,
    NETS,
    Exact,
    X,
    averaged,
    slope,
    some_goal,
    some_images,
    some_nets,
)

from robustkit.attack_api import Surrogates, compose
from robustkit.core.criteria import Goal
from robustkit.core.rng import RowRng
from robustkit.core.threat import ThreatModel
from robustkit.registry import parse_attack
from robustkit.runs.craft_record import Judgement

THREATS = {"linf": ThreatModel.parse("linf:8/255"), "l2": ThreatModel.parse("l2:0.5")}
norms = pytest.mark.parametrize("norm", THREATS)
RULES = ("i-fgsm(steps=4,step_size=0.1eps)", "mi-fgsm(steps=4,step_size=0.1eps)", "pgd(steps=4)", "cwa(steps=3)")
rules = pytest.mark.parametrize("rule", RULES)


class Posterior:
    """Nets as a population; it tells which were asked for a gradient, and with how many rows."""

    def __init__(self, nets: Sequence[object]) -> None:
        self.nets, self.backwards = nets, 0
        self.queries: list[Any] = []

    def __len__(self) -> int:
        return len(self.nets)

    def __call__(self, x):
        return torch.stack([net(x).softmax(1) for net in self.nets]).mean(0).log()

    def sample(self, number):
        def one(x):
            if x.requires_grad:
                self.queries.append(number)
                self.backwards += len(x)
            return self.nets[number](x)

        return one


def craft(attack, *posteriors, x=X, goal=GOAL, norm="linf", threat=None, seed=0, ids=None, **words):
    threat = threat or THREATS[norm]
    rng = RowRng(seed, "light", torch.arange(3, 3 + len(x)) if ids is None else ids)
    members = [Posterior(nets) if isinstance(nets, list) else nets for nets in posteriors]
    whole = compose(parse_attack(attack, threat.norm))
    return whole(Surrogates(members, **words), x, goal, threat, rng=rng)


# L12


def written_out(steps, momentum=None, nets=NETS, tiny=0.0):
    """Return the change of the paper's light attack in l2; `tiny` is what the authors' code adds to norms."""
    x, total = X, torch.zeros_like(X)
    for step in range(steps):
        gradient = slope(nets[step % len(nets)], x, GOAL)
        if momentum is not None:
            gradient = total = momentum * total + gradient / (gradient.abs().sum() + tiny)
        moved = (x + 0.05 * gradient / (gradient.norm() + tiny)).clamp(0, 1) - X
        x = X + moved * (0.5 / (moved.norm() + tiny)).clamp(max=1)
    return (x - X).flatten()


GOLDEN = {
    "i-fgsm(steps=1,step_size=0.1eps)": (
        0.02896197,
        -0.02304934,
        -0.00179389,
        -0.00202522,
        -0.0334836,
        0.00120869,
    ),
    "i-fgsm(steps=2,step_size=0.1eps)": (0.01868473, -0.02616273, 0.03762015, 0.0225797, -0.01845807, 0.00101199),
    "i-fgsm(steps=3,step_size=0.1eps)": (0.0127136, -0.0197856, 0.02521325, -0.00785653, 0.01765934, -0.00519155),
    "i-fgsm(steps=6,step_size=0.1eps)": (
        0.02677088,
        -0.03806226,
        0.05171649,
        -0.01741519,
        0.03331104,
        -0.01258233,
    ),
    "mi-fgsm(steps=3,step_size=0.1eps,momentum=0.9)": (
        0.05639763,
        -0.06678033,
        0.06287701,
        0.00691171,
        -0.02033451,
        -0.00501626,
    ),
}
FULL = (0.081326, -0.03967162, -0.04266317, -0.05619257, -0.08228096, 0.0218763)


@pytest.mark.parametrize("attack", GOLDEN)
def test_golden_l2(attack):
    """The numbers hold the 1e-7 that the authors' code adds to norms: it is all that differs from ours."""
    (rule,) = parse_attack(attack, "l2")
    momentum, golden = getattr(rule, "momentum", None), torch.tensor(GOLDEN[attack]).double()
    torch.testing.assert_close(written_out(rule.steps, momentum, tiny=1e-7), golden, rtol=0, atol=1e-7)
    found = (craft(f"{attack}+light(order=listed)", NETS, norm="l2") - X).flatten()
    torch.testing.assert_close(found, written_out(rule.steps, momentum), rtol=0, atol=1e-12)
    torch.testing.assert_close(found, golden, rtol=0, atol=2e-5)


def test_golden_full():
    found = (craft("i-fgsm(steps=3,step_size=0.1eps)+full", NETS, norm="l2", combine="logits") - X).flatten()
    torch.testing.assert_close(found, torch.tensor(FULL).double(), rtol=0, atol=1e-7)
    torch.testing.assert_close(found, written_out(3, nets=[averaged(NETS)]), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("steps", "delta"),
    [
        (1, (0.4, -0.4, -0.4, -0.4, -0.4, 0.4)),
        (2, (0, -0.8, 0, 0, 0, 0.8)),
        (3, (-0.4, -0.4, -0.4, -0.4, 0.4, 0.4)),
        (6, (-0.8, -0.8, -0.8, -0.8, 0.8, 0.8)),
    ],
)
def test_golden_linf(steps, delta):
    attack = f"i-fgsm(steps={steps},step_size=0.1eps)+light(order=listed)"
    found = (craft(attack, NETS, threat=Exact(Fraction(4, 255))) - X) * 255
    torch.testing.assert_close(found.flatten(), torch.tensor(delta).double(), rtol=0, atol=1e-5)


# L1 to L11, on random nets


@norms
@rules
@pytest.mark.parametrize("technique", ["", "+light(samples=2)", "+full"])
def test_l1_inside_ball_and_box(norm, rule, technique):
    x = some_images()
    found = craft(rule + technique, some_nets(3), some_nets(2, seed=4), x=x, goal=some_goal(), norm=norm)
    assert THREATS[norm].contains(found, x).all()
    assert ((found >= 0) & (found <= 1)).all()


@norms
@rules
def test_l2_equal_samples_are_one_net(norm, rule):
    """Two or four of them: sums of as many equal numbers, and their shares, are exact in any order."""
    net, x, goal = some_nets(1)[0], some_images(), some_goal()
    alone = craft(rule, net, x=x, goal=goal, norm=norm)
    assert torch.equal(craft(rule, [net] * 4, x=x, goal=goal, norm=norm), alone)
    if not rule.startswith("cwa"):  # whose inner loop is as long as there are members
        for technique in ("light(samples=2)", "full"):
            for combine in ("logits", "loss", "gradients"):
                found = craft(f"{rule}+{technique}", [net] * 4, x=x, goal=goal, norm=norm, combine=combine)
                single = craft(rule, net, x=x, goal=goal, norm=norm, combine=combine)
                assert torch.equal(found, single)


@pytest.mark.parametrize("rule", ["i-fgsm", "mi-fgsm", "pgd(restarts=1)"])
def test_l3_every_sample_is_used_equally_often(rule):
    nets, x = some_nets(4), some_images()
    attack = rule.replace("(", "(steps=12,") if "(" in rule else f"{rule}(steps=12)"
    for technique, each in (("", 3), ("+light(samples=2)", 6), ("+full", 12)):
        posterior = Posterior(nets)
        craft(attack + technique, posterior, x=x, goal=some_goal())
        assert [posterior.queries.count(number) for number in range(4)] == [each] * 4
        assert posterior.backwards == len(x) * 4 * each
        rounds = [posterior.queries[index : index + 4] for index in range(0, len(posterior.queries), 4)]
        assert all(sorted(one) == [0, 1, 2, 3] for one in rounds)


@norms
@pytest.mark.parametrize("combine", ["logits", "probabilities", "loss", "gradients"])
def test_l4_as_many_as_there_are_is_full(norm, combine):
    nets, x, goal = some_nets(3), some_images(), some_goal()
    full = craft("mi-fgsm(steps=3,step_size=0.1eps)+full", nets, x=x, goal=goal, norm=norm, combine=combine)
    members = craft("mi-fgsm(steps=3,step_size=0.1eps)", *nets, x=x, goal=goal, norm=norm, combine=combine)
    torch.testing.assert_close(full, members)
    for technique in ("light(samples=3)", "light(samples=3,order=listed)", "light(samples=99)"):
        found = craft(
            f"mi-fgsm(steps=3,step_size=0.1eps)+{technique}", nets, x=x, goal=goal, norm=norm, combine=combine
        )
        torch.testing.assert_close(found, full)


@norms
@rules
@pytest.mark.parametrize("technique", ["", "+light(samples=2,fresh=step)", "+full", "+di", "+vmi(copies=2)"])
def test_l5_an_image_does_not_depend_on_the_others(norm, rule, technique):
    groups, x, goal = (some_nets(5), some_nets(3, seed=4)), some_images(), some_goal()
    attack, ids = rule + technique, torch.arange(3, 8)
    whole = craft(attack, *groups, x=x, goal=goal, norm=norm, ids=ids)
    for index in (torch.tensor([3]), torch.tensor([4, 0, 2])):
        part = craft(attack, *groups, x=x[index], goal=goal.select(index), norm=norm, ids=ids[index])
        torch.testing.assert_close(part, whole[index], rtol=0, atol=1e-12)


@norms
@rules
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_l6_the_size_of_the_loss_does_not_matter(norm, rule, scale, monkeypatch):
    nets, x, goal = some_nets(3), some_images(), some_goal()
    expected = craft(f"{rule}+light(samples=2)", nets, x=x, goal=goal, norm=norm, combine="loss")
    loss = Goal.loss
    monkeypatch.setattr(Goal, "loss", lambda *words: scale * loss(*words))
    found = craft(f"{rule}+light(samples=2)", nets, x=x, goal=goal, norm=norm, combine="loss")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [1e-12, 1e-20])
def test_l7_tiny_gradients_move_as_far_as_others(dtype, size):
    """The authors' code adds 1e-7 to a norm divided by the batch: two thirds of a net's gradients were smaller."""
    x = some_images().to(dtype)
    slopes = [size * net for net in torch.randn(3, 12, generator=torch.Generator().manual_seed(0)).to(dtype)]
    nets = [lambda x, slope=slope: torch.stack([(x.flatten(1) * slope).sum(1)] * 2, 1) * 0.5 for slope in slopes]
    nets = [lambda x, net=net: net(x) * torch.tensor([1.0, -1.0]).to(dtype) for net in nets]
    goal = Goal(torch.zeros(5, dtype=torch.int64))
    length = 0.1 * 0.5
    for technique in ("", "+full"):
        moved = craft(f"i-fgsm(steps=1,step_size=0.1eps){technique}", nets, x=x, goal=goal, norm="l2") - x
        torch.testing.assert_close(moved.flatten(1).norm(dim=1), torch.full((5,), length, dtype=dtype))


@norms
@rules
def test_l7_no_gradient_no_move(norm, rule):
    x = some_images()
    still = [lambda x: torch.zeros(len(x), 4).double() + 0 * x.sum()] * 3
    found = craft(rule, still, x=x, goal=some_goal(), norm=norm) if not rule.startswith("pgd") else x
    assert torch.equal(found, x)


@norms
def test_l8_momentum_zero_is_i_fgsm(norm):
    nets, x, goal = some_nets(3), some_images(), some_goal()
    plain = craft("i-fgsm(steps=5,step_size=0.1eps)", nets, x=x, goal=goal, norm=norm)
    torch.testing.assert_close(
        craft("mi-fgsm(steps=5,step_size=0.1eps,momentum=0)", nets, x=x, goal=goal, norm=norm), plain
    )


@norms
def test_l8_what_gradients_are_divided_by_is_a_constant_factor(norm):
    """By their sum or by their mean: twelve times as much in all, and a direction has no size."""
    net, x, goal, threat = some_nets(1)[0], some_images(), some_goal(), THREATS[norm]
    point, velocity = x, torch.zeros_like(x)
    for _ in range(5):
        images = point.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(goal.loss(net(images)).sum(), images)
        velocity = velocity + gradient / gradient.abs().mean((1, 2, 3), keepdim=True)
        point = threat.project(point + 0.1 * float(threat.eps) * threat.ascent(velocity), x)
    found = craft("mi-fgsm(steps=5,step_size=0.1eps)", net, x=x, goal=goal, norm=norm)
    torch.testing.assert_close(found, point, rtol=0, atol=1e-12)


def test_l9_fgsm_moves_every_pixel_by_eps():
    x = some_images()
    found = craft("fgsm+full", some_nets(3), x=x, goal=some_goal(), threat=Exact(Fraction(16, 255)))
    free = (x > EPS) & (x < 1 - EPS)
    torch.testing.assert_close((found - x)[free].abs(), torch.full_like(x, EPS)[free])


def test_l10_the_order_is_the_seeds():
    nets, x, goal = some_nets(7), some_images(), some_goal()

    def order(seed):
        posterior = Posterior(nets)
        craft("i-fgsm(steps=7,step_size=0.1eps)", posterior, x=x, goal=goal, seed=seed)
        posterior(x)  # clean evaluation between batches
        craft("i-fgsm(steps=7,step_size=0.1eps)", posterior, x=x[:2], goal=goal.select(torch.arange(2)), seed=seed)
        assert posterior.queries[:7] == posterior.queries[7:]
        return posterior.queries[:7]

    before = torch.get_rng_state()
    orders = [order(seed) for seed in range(6)]
    assert torch.equal(before, torch.get_rng_state())
    assert orders == [order(seed) for seed in range(6)]
    assert len(set(map(tuple, orders))) > 3


def test_l10_architectures_are_shuffled_apart():
    groups = [Posterior(some_nets(9)) for _ in range(2)]
    craft("i-fgsm(steps=9,step_size=0.1eps)", *groups, x=some_images(), goal=some_goal())
    assert groups[0].queries != groups[1].queries


def test_l11_success_is_over_images_the_target_got_right():
    """The authors' arrays were padded with black images of label 0, which counted as successes."""
    labels = [0, 1, 1, 2]
    predictions = {"clean": [0, 1, 0, 0], "adversarial": [0, 3, 0, 0]}
    judged = Judgement.of({"string": "m", "fingerprint": "f"}, labels, None, predictions)
    assert (judged.rate.n, judged.rate.value) == (2, 0.5)


# CWA over posteriors


def test_the_inner_loop_takes_fresh_samples():
    nets = some_nets(6)
    posteriors = [Posterior(nets), Posterior(nets)]
    craft("cwa(steps=3)", *posteriors, x=some_images(), goal=some_goal())
    for posterior in posteriors:
        # A step back and an inner step of each architecture, three times, and no sample twice.
        assert sorted(posterior.queries) == list(range(6))


def test_antithetic_ways_share_a_steps_samples():
    posterior = Posterior(some_nets(6))
    attack = "mi-cse(steps=2,order=antithetic)+light(samples=3,fresh=step)"
    craft(attack, posterior, x=some_images(), goal=some_goal())
    first, second = posterior.queries[:6], posterior.queries[6:]
    assert first[3:] == first[2::-1]
    assert second[3:] == second[2::-1]
    assert sorted(first[:3] + second[:3]) == list(range(6))


@norms
def test_cwa_over_single_samples_is_cwa(norm):
    nets, x, goal = some_nets(3), some_images(), some_goal()
    groups = [[net] for net in nets]
    found = craft("cwa(order=antithetic)", *groups, x=x, goal=goal, norm=norm)
    assert torch.equal(found, craft("cwa(order=antithetic)", *nets, x=x, goal=goal, norm=norm))
    full = craft("cwa(order=antithetic)+full", nets, x=x, goal=goal, norm=norm)
    torch.testing.assert_close(full, found)


@pytest.mark.parametrize(
    "technique", ["adaea", "smer", "svre", "vmi(copies=2)", "ssa(copies=2)", "di", "ti", "si"]
)
def test_other_techniques_over_samples(technique):
    x, goal = some_images(), some_goal()
    for light in ("", "+light(samples=2)", "+full"):
        found = craft(
            f"mi-fgsm(steps=2,step_size=0.1eps)+{technique}{light}",
            some_nets(3),
            some_nets(2, seed=4),
            x=x,
            goal=goal,
        )
        assert THREATS["linf"].contains(found, x).all()
        assert not torch.equal(found, x)
