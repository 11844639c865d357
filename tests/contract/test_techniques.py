"""What every technique must do, parametrised over the registry: a new file in attacks/ needs no edit here."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch
from torch import nn

from robustkit import registry
from robustkit.attack_api import Composition, OracleWrapper, Surrogates, ascend, compose, split_rng
from robustkit.core.criteria import Goal
from robustkit.core.errors import UsageError
from robustkit.core.rng import RowRng
from robustkit.core.threat import ThreatModel
from robustkit.registry import make, make_technique, spec

SHAPE = (5, 3, 7, 9)
CLASSES = 4
TECHNIQUES = sorted(registry.catalog("technique"))
THREATS = {"linf": "linf:0.1", "l2": "l2:1"}
RULES = ("mi-fgsm", "pgd", "member by member")
# Less effort than the defaults.
LITTLE = {"copies": 2, "mixes": 2, "scales": 1, "rounds": 3, "steps": 1}

every = pytest.mark.parametrize("name", TECHNIQUES)
both = pytest.mark.parametrize("norm", THREATS)


class BasicBlock(nn.Module):
    """A residual block with a shortcut."""

    def __init__(self, inside, outside):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1)
        self.shortcut = nn.Conv2d(inside, outside, 1) if inside != outside else nn.Sequential()

    def forward(self, x):
        return torch.tanh(self.conv2(torch.tanh(self.conv1(x))) + self.shortcut(x))


class Net(nn.Module):
    """Two residual blocks; rows in `still` have logits that do not depend on the image."""

    def __init__(self, seed, still=None):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = nn.Sequential(BasicBlock(3, 4), BasicBlock(4, 4))
            self.weight = nn.Parameter(torch.randn(CLASSES, 4, *SHAPE[2:]))
        self.still = still
        self.eval().double()

    def forward(self, x):
        # No matrix product: its rounding depends on the batch size.
        logits = (self.body(3 * (x - 0.5))[:, None] * self.weight).sum((2, 3, 4)) / 2
        return logits if self.still is None else torch.where(self.still[:, None], logits.detach(), logits)


@dataclass(frozen=True)
class MemberByMember:
    """A rule that asks each member by itself, and all together, in every step."""

    steps: int = 2
    loss: str = "ce"

    def wrap(self, oracle):
        class Each(OracleWrapper):
            def gradient(self, rows, x, members=None, weights=None):
                total = self.inner.gradient(rows, x)
                for member in range(len(self.surrogates)):
                    total = total + self.inner.gradient(split_rng(rows, "member", member), x, [member])
                return total

        return Each(oracle)

    def init(self, rows):
        return {"x": rows.x}

    def step(self, rows, state, answer):
        size = 0.4 * float(rows.threat.eps)
        return {"x": rows.threat.project(state["x"] + size * rows.threat.ascent(answer.gradient), rows.x)}


def technique(name):
    kind = registry.find("technique", name)
    names = {field.name for field in fields(kind)}
    return make_technique(name, **{word: value for word, value in LITTLE.items() if word in names})


def rule_of(word):
    return MemberByMember() if word == "member by member" else make(word, steps=2, step_size=0.5)


def images(dtype=torch.float64, seed=0):
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def problem(dtype=torch.float64):
    members = [Net(seed).to(dtype) for seed in (1, 2)]
    x = images(dtype)
    labels = members[0](x).argmax(1)
    return Surrogates(members, pool=images(dtype, 9)), x, Goal(labels)


def run(rule, techniques, surrogates, x, goal, norm, rng=None):
    rng = rng or RowRng(0, "contract", torch.arange(10, 10 + len(x)))
    return ascend(rule, surrogates, x, goal, ThreatModel.parse(THREATS[norm]), rng, techniques)


def rise(surrogates, x, found, goal):
    """Return by how much the loss rose on the whole: two noisy steps need not raise each row's."""
    with torch.no_grad():
        return (goal.loss(surrogates(found)) - goal.loss(surrogates(x))).sum()


@every
@both
@pytest.mark.parametrize("rule", RULES)
def test_result_is_inside_the_ball_and_raises_the_loss(name, norm, rule):
    surrogates, x, goal = problem()
    found = run(rule_of(rule), [technique(name)], surrogates, x, goal, norm)
    assert found.shape == x.shape
    assert found.dtype == x.dtype
    assert not found.requires_grad
    assert ThreatModel.parse(THREATS[norm]).contains(found, x).all()
    assert rise(surrogates, x, found, goal) > 0


@every
@both
@pytest.mark.parametrize("rule", ["mi-fgsm", "member by member"])
def test_result_is_independent_of_the_batch(name, norm, rule):
    surrogates, x, goal = problem()
    rng = RowRng(3, "contract", torch.tensor([7, 1, 4, 9, 2]))
    whole = run(rule_of(rule), [technique(name)], surrogates, x, goal, norm, rng)
    assert torch.equal(whole, run(rule_of(rule), [technique(name)], surrogates, x, goal, norm, rng))
    for order in ([4, 2, 0, 3, 1], [2]):
        index = torch.tensor(order)
        part = run(
            rule_of(rule), [technique(name)], surrogates, x[index], goal.select(index), norm, rng.select(index)
        )
        # The library's own sums differ in the last bits with the batch.
        torch.testing.assert_close(part, whole[index], rtol=0, atol=1e-12)


@every
def test_random_draws_depend_on_seed_and_sample(name):
    surrogates, x, goal = problem()
    rngs = [RowRng(seed, "contract", torch.arange(first, first + 5)) for seed, first in ((0, 0), (1, 0), (0, 50))]
    runs = [run(rule_of("mi-fgsm"), [technique(name)], surrogates, x, goal, "l2", rng) for rng in rngs]
    same = [torch.equal(runs[0], other) for other in runs[1:]]
    # Of svre and smer the order of members alone is random: with the seed, not with the sample.
    # Posteriors' samples alone are dealt at random, and there are none here.
    expected = {
        "light": [1, 1],
        "full": [1, 1],
        "ti": [1, 1],
        "si": [1, 1],
        "sgm": [1, 1],
        "adaea": [1, 1],
        "triage": [1, 1],
        "svre": [0, 1],
        "smer": [0, 1],
    }
    assert same == [bool(flag) for flag in expected.get(name, [0, 0])]


@every
@both
def test_a_row_without_gradient_does_not_move(name, norm):
    surrogates, x, goal = problem()
    still = torch.tensor([False, True, False, False, True])
    frozen = replace(surrogates, members=[Net(seed, still) for seed in (1, 2)])
    found = run(rule_of("member by member"), [technique(name)], frozen, x, goal, norm)
    assert torch.equal(found[still], x[still])
    assert not found.isnan().any()
    moving = run(rule_of("member by member"), [technique(name)], surrogates, x, goal, norm)
    torch.testing.assert_close(found[~still], moving[~still], rtol=0, atol=1e-12)
    nowhere = replace(surrogates, members=[Net(seed, torch.ones(5, dtype=torch.bool)) for seed in (1, 2)])
    assert torch.equal(run(rule_of("member by member"), [technique(name)], nowhere, x, goal, norm), x)


@every
@pytest.mark.parametrize(("trainable", "fault"), [(True, False), (False, True)])
def test_no_side_effects(name, trainable, fault):
    surrogates, x, goal = problem()
    for model in surrogates.members:
        model.train(trainable)
        for parameter in model.parameters():
            parameter.requires_grad_(trainable)
            parameter.grad = torch.full_like(parameter, 0.25)
    values = [x, goal.labels, surrogates.pool, *(p for model in surrogates.members for p in model.parameters())]
    kept = [value.detach().clone() for value in values]
    torch.manual_seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    if fault:
        handle = surrogates.members[1].body[1].conv2.register_forward_hook(_raise)
        with pytest.raises(ZeroDivisionError):
            run(rule_of("mi-fgsm"), [technique(name)], surrogates, x, goal, "linf")
        handle.remove()
    else:
        run(rule_of("mi-fgsm"), [technique(name)], surrogates, x, goal, "linf")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert all(map(torch.equal, kept, values))
    assert x.grad is None
    assert not x.requires_grad
    for model in surrogates.members:
        assert model.training == trainable
        for module in model.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
            assert not module._backward_hooks
        for parameter in model.parameters():
            assert parameter.requires_grad == trainable
            assert (parameter.grad == 0.25).all()


def _raise(*args):
    raise ZeroDivisionError


@every
def test_float32_gives_the_result_of_float64(name):
    found = {}
    for dtype in (torch.float32, torch.float64):
        surrogates, x, goal = problem(dtype)
        found[dtype] = run(rule_of("mi-fgsm"), [technique(name)], surrogates, x, goal, "l2")
        assert found[dtype].dtype == dtype
    torch.testing.assert_close(found[torch.float32].double(), found[torch.float64], rtol=0, atol=2e-3)


@every
@pytest.mark.parametrize("others", [(), ("vmi",)])
def test_gradients_are_those_of_the_declared_cost(name, others):
    surrogates, x, goal = problem()
    spent = []

    class Counted(Net):
        def forward(self, x):
            logits = super().forward(x)
            if logits.requires_grad:
                logits.register_hook(lambda gradient: spent.append(len(gradient)))
            return logits

    counted = replace(surrogates, members=[Counted(1), Counted(2)])
    techniques = tuple(technique(word) for word in (name, *others))
    attack = Composition(make("mi-fgsm", steps=3), techniques)
    attack(counted, x, goal, ThreatModel.parse("linf:0.1"), rng=RowRng(0, "cost", torch.arange(5)))
    per_image = sum(spent) / len(x) / len(counted)
    assert per_image <= attack.gradients
    # A first step, or a last, may come cheaper.
    assert per_image >= 0.5 * attack.gradients


@every
def test_targeted_attacks_move_towards_the_target(name):
    surrogates, x, goal = problem()
    aim = Goal(goal.labels, (goal.labels + 1) % CLASSES)
    found = run(rule_of("mi-fgsm"), [technique(name)], surrogates, x, aim, "linf")
    assert rise(surrogates, x, found, aim) > 0


@every
def test_one_model_is_an_ensemble_of_one(name):
    surrogates, x, goal = problem()
    single = surrogates.select([0])
    found = run(rule_of("mi-fgsm"), [technique(name)], single, x, goal, "linf")
    assert rise(single, x, found, goal) > 0


@every
@pytest.mark.parametrize(
    ("combine", "hold"),
    [("logits", False), ("probabilities", True), ("loss", False), ("gradients", True), ("consensus", False)],
)
def test_every_way_to_combine_surrogates_is_supported(name, combine, hold):
    surrogates, x, goal = problem()
    surrogates = replace(surrogates, combine=combine, hold=hold)
    found = run(rule_of("mi-fgsm"), [technique(name)], surrogates, x, goal, "linf")
    assert rise(surrogates, x, found, goal) > 0


@every
def test_specs_rebuild_the_same_technique(name):
    first = make_technique(name)
    assert make_technique(**spec(first)) == first
    assert hash(first) == hash(make_technique(**spec(first)))
    entry = registry.catalog("technique")[name]
    assert first.info == entry.info
    assert entry.summary.endswith(".")
    assert entry.info.paper


@every
@pytest.mark.parametrize("size", [1, 0])
def test_small_batches_are_accepted(name, size):
    surrogates, x, goal = problem()
    index = torch.arange(size)
    found = run(rule_of("mi-fgsm"), [technique(name)], surrogates, x[:size], goal.select(index), "linf")
    assert found.shape == x[:size].shape


@pytest.mark.parametrize("name", sorted(registry.catalog("recipe")))
def test_recipes_combine_with_techniques(name):
    surrogates, x, goal = problem()
    attack = compose(registry.parse_attack(f"{name}+di", "linf"))
    attack = replace(attack, rule=replace(attack.rule, steps=2, step_size=0.5))
    found = attack(surrogates, x, goal, ThreatModel.parse("linf:0.1"), rng=RowRng(0, "r", torch.arange(5)))
    assert rise(surrogates, x, found, goal) > 0
    with pytest.raises(UsageError, match="takes no fields"):
        registry.parse_attack(f"{name}(steps=3)", "linf")
