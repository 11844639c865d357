"""Every attack on a linear model whose nearest adversarial point is known in closed form.

Model, images, batch sizes and factors are those of adversarial-library's suite (github.com/jeromerony/
adversarial-library, BSD-3), written anew: two opposed classes of which the image's mean decides, others that are
never near. All coordinates count the same there, so attacks that prefer some by accident are found out.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import nn

from robustkit import minimum_norm, registry
from robustkit.attack_api import Surrogates, compose
from robustkit.core.criteria import Goal
from robustkit.core.rng import RowRng
from robustkit.core.threat import ThreatModel
from robustkit.registry import make, make_technique, spec

# Batch size, image shape, mean and spread of the pixels, classes.
CASES = ((3, (1, 4, 6), 0.75, 0.03, 4), (8, (5, 7, 7), 0.55, 0.01, 3))
# How many times the closest distance a budget is, and a minimum-norm attack may end at.
BUDGET, MINIMUM = 1.25, 1.06
# A tenth of the usual effort, and less where there is nothing to find.
EFFORT = {"steps": 10, "restarts": 1, "queries": 1000}
LESS = {"steps": 3, "restarts": 1, "queries": 30}
LITTLE = {"copies": 2, "mixes": 2, "scales": 1, "rounds": 3, "steps": 1}

# What takes more effort, a larger budget or no target, and why.
FIELDS: dict[str, dict[str, Any]] = {
    # The sphere begins with a radius of 1 and shrinks by 5 % a step: ten do not reach distances of 0.14.
    "ddn": {"steps": 50},
    # Its step is a fortieth of eps by default: ten steps end at a quarter of it.
    "foolbox:LinfPGD": {"steps": 20, "rel_stepsize": 0.1},
    "foolbox:L2PGD": {"steps": 20, "rel_stepsize": 0.1},
    "foolbox:L1PGD": {"steps": 20, "rel_stepsize": 0.1},
}
FACTORS = {
    # Random search in squares of one bump each: the even change that is best here is none of theirs.
    ("square", "l2"): 5,
    ("square", "l1"): 3,
    ("autoattack:square", "linf"): 2,
    ("autoattack:square", "l2"): 6,
    ("autoattack:square", "l1"): 3,
}
NOT_TARGETED = {
    # AutoAttack's attacks aim at any other class, and say so.
    "autoattack:apgd-ce",
    "autoattack:apgd-dlr",
    "autoattack:apgd-t",
    "autoattack:fab",
    "autoattack:fab-t",
    "autoattack:square",
}
# They change residual blocks, of which a linear model has none.
NEED_BLOCKS = {"ghost", "sgm"}
FAMILIES = {
    "foolbox": {
        "linf": ("foolbox:LinfPGD", "foolbox:LinfBasicIterativeAttack", "foolbox:LinfDeepFoolAttack"),
        "l2": ("foolbox:L2PGD", "foolbox:L2BasicIterativeAttack", "foolbox:L2DeepFoolAttack"),
        "l1": ("foolbox:L1PGD", "foolbox:SparseL1DescentAttack"),
    }
}


def attacks(*, minimal=None):
    """Return (name, norm) of every registered attack, of minimum-norm ones alone or of the others."""
    found = []
    for name, entry in registry.catalog("attack").items():
        if minimal is None or entry.info.minimal == minimal:
            for norm in entry.info.norms:
                names = FAMILIES[name][norm] if entry.info.family else (name,)
                found += [(one, norm) for one in names]
    return found


class Linear(nn.Module):
    """Logits -z, z, -1, -2 ... of z, the image's mean less a half."""

    def __init__(self, classes):
        super().__init__()
        self.register_buffer("others", -torch.arange(1.0, classes - 1))

    def forward(self, x):
        z = x.flatten(1).mean(1, keepdim=True) - 0.5
        return torch.cat([-z, z, self.others.expand(len(x), -1)], 1)


def problem(case, norm, targeted):
    """Return the model, images of class 1, the goal to leave it or to reach class 0, and the least distances."""
    size, shape, mean, spread, classes = case
    draw = torch.Generator().manual_seed(0)
    x = (mean + spread * torch.randn(size, *shape, generator=draw)).clamp(0, 1)
    goal = Goal(torch.ones(size, dtype=torch.long), torch.zeros(size, dtype=torch.long) if targeted else None)
    pixels = math.prod(shape)
    length = {"linf": 1.0, "l2": pixels**0.5, "l1": float(pixels)}[norm]
    return Linear(classes).eval(), x, goal, length * (x.double().flatten(1).mean(1) - 0.5)


def prepared(name, effort=None):
    """Return the attack with little effort."""
    known = FIELDS.get(name, {}) if name.startswith("foolbox:") else spec(make(name))
    fields = {**EFFORT, **FIELDS.get(name, {}), **(effort or {})}
    return make(name, **{field: value for field, value in fields.items() if field in known})


def run(attack, model, x, goal, threat):
    torch.manual_seed(0)
    found = attack(model, x.clone(), goal, threat, rng=RowRng(0, "linear", torch.arange(len(x))))
    return threat.project(found, x)


def threat_of(norm, radius):
    return ThreatModel.parse(f"{norm}:{Fraction(radius).limit_denominator(10**7)}")


def goals(pairs):
    """Return the pairs with `targeted`, where the attack takes targets, twice."""
    return [
        pytest.param(name, norm, targeted, id=f"{name}-{norm}-{'targeted' if targeted else 'untargeted'}")
        for name, norm in pairs
        for targeted in (False, True)
        if not (targeted and name in NOT_TARGETED)
    ]


def skip_where_it_stops(name, norm, case):
    """Skip what the official Square in l2 and l1 cannot do: it divides by zero on images that are so small."""
    if name == "autoattack:square" and norm != "linf" and case is CASES[0]:
        pytest.skip("the official Square divides by zero on images of 4 x 6")


both = pytest.mark.parametrize("case", CASES, ids=["1x4x6", "5x7x7"])


@both
@pytest.mark.parametrize(("name", "norm", "targeted"), goals(attacks()))
def test_attacks_succeed_at_1_25_times_the_exact_distance(name, norm, targeted, case):
    skip_where_it_stops(name, norm, case)
    model, x, goal, distance = problem(case, norm, targeted)
    threat = threat_of(norm, FACTORS.get((name, norm), BUDGET) * distance.max().item())
    assert goal.reached(model(run(prepared(name), model, x, goal, threat))).all()


@pytest.mark.parametrize(("name", "norm", "targeted"), goals(attacks()))
def test_attacks_fail_below_the_exact_distance(name, norm, targeted):
    model, x, goal, distance = problem(CASES[1], norm, targeted)
    found = run(prepared(name, LESS), model, x, goal, threat_of(norm, 0.95 * distance.min().item()))
    assert not goal.reached(model(found)).any()


@both
@pytest.mark.parametrize(("name", "norm", "targeted"), goals(attacks(minimal=True)))
def test_minimum_norm_attacks_reach_the_exact_distance(name, norm, targeted, case):
    model, x, goal, distance = problem(case, norm, targeted)
    threat = ThreatModel.parse(f"{norm}:min")
    found = run(prepared(name), model, x, goal, threat)
    assert goal.reached(model(found)).all()
    ratio = threat.distance(found, x) / distance
    assert (ratio <= MINIMUM).all(), ratio.tolist()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_fab_crosses_the_boundary_by_more_than_rounding(norm):
    """Successes are verified in another batch; one right at the boundary is lost there."""
    model, x, goal, distance = problem((10, (3, 32, 32), 0.55, 0.01, 3), norm, False)
    found = minimum_norm(model, x, goal.labels, norm, attack="fab(steps=10,restarts=1)")
    assert (torch.as_tensor(found.distance) <= MINIMUM * distance).all()


@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
@pytest.mark.parametrize("name", sorted(set(registry.catalog("technique")) - NEED_BLOCKS))
def test_transfer_techniques_succeed_above_the_exact_distance(name, targeted):
    model, x, goal, distance = problem((3, (1, 7, 9), 0.75, 0.03, 4), "linf", targeted)
    known = spec(make_technique(name))
    technique = make_technique(name, **{field: value for field, value in LITTLE.items() if field in known})
    attack = compose([make("mi-fgsm", steps=3), technique])
    threat = threat_of("linf", BUDGET * distance.max().item())
    assert goal.reached(model(run(attack, Surrogates([model, model], pool=x), x, goal, threat))).all()
