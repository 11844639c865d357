"""What every attack must do, parametrised over the registry: a new file in attacks/ needs no edit here.

The checks are those of `robustkit.testing`; the mutants at the end show that they find faults.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from robustkit import registry
from robustkit.attack_api import Rows, RowWise, query
from robustkit.core.criteria import Goal
from robustkit.core.rng import RowRng
from robustkit.core.threat import ThreatModel
from robustkit.registry import make, spec
from robustkit.testing.attacks import (
    check_budget,
    check_fails,
    check_global_generators,
    check_inside,
    check_labels_only,
    check_no_side_effects,
    check_repeatable,
    check_row_independent,
    check_succeeds,
    count_passes,
    run,
)
from robustkit.testing.problems import NORMS, PROBLEMS, SHAPE, corners, plane, rng_of, sphere, threat_at

# Less effort than the defaults, where those take long.
FIELDS = {
    "autoattack:apgd-ce": {"steps": 20, "restarts": 1},
    "autoattack:apgd-dlr": {"steps": 20, "restarts": 1},
    "autoattack:apgd-t": {"steps": 20},
    "autoattack:fab": {"steps": 10, "restarts": 1},
    "autoattack:fab-t": {"steps": 10},
    "autoattack:square": {"queries": 400},
    "apgd": {"steps": 20, "restarts": 1},
    "apgd-t": {"steps": 20, "targets": 3},
    "fab": {"steps": 10, "restarts": 1},
    "fab-t": {"steps": 10, "targets": 3},
    "fmn": {"steps": 30},
    "race": {"targets": 5, "steps": 20, "restarts": 2},
    "square": {"queries": 150},
    "rays": {"queries": 400},
    "hop-skip-jump": {"queries": 400},
    "mora": {"steps": 20, "restarts": 2},
    "mora-t": {"steps": 20, "targets": 3},
}
FAMILIES = {
    "foolbox": {
        "linf": ("foolbox:LinfPGD", {"steps": 20, "rel_stepsize": 0.1}),
        "l2": ("foolbox:L2PGD", {"steps": 20, "rel_stepsize": 0.1}),
        "l1": ("foolbox:L1PGD", {"steps": 20, "rel_stepsize": 0.1}),
    }
}
# What shows in each step shows in few.
BRIEF = {"steps": 6, "queries": 40}
# How many times the nearest distance a weaker search gets (1.5 for all others).
SLACK = {
    ("autoattack:square", "linf"): 4,
    ("autoattack:square", "l2"): 6,
    ("autoattack:square", "l1"): 3,
    ("foolbox:L1PGD", "l1"): 2,
    ("square", "linf"): 6,
    ("rays", "linf"): 6,
    ("hop-skip-jump", "l2"): 6,
    ("square", "l2"): 5,
    ("square", "l1"): 2,
}
# One gradient finds the nearest point of a plane, not of a sphere.
PLANES_ONLY = {"fgsm"}


def cases(*, own=None, reduced=True):
    """Return (name, fields, norm) for every registered attack and norm."""
    found: list[tuple[Any, ...]] = []
    for name, entry in registry.catalog("attack").items():
        if own is not None and own == entry.info.coupled:
            continue
        for norm in entry.info.norms:
            if not entry.info.family:
                found.append((name, FIELDS.get(name, {}), norm))
            elif norm in FAMILIES.get(name, {}):
                found.append((*FAMILIES[name][norm], norm))
    return [pytest.param(*case, id=f"{case[0]}-{case[2]}") for case in found]


def brief(name, fields):
    """Return an attack of these fields, but of few steps."""
    attack = make(name, **fields)
    own = {field.name for field in dataclasses.fields(attack)}
    few = {word: min(most, getattr(attack, word)) for word, most in BRIEF.items() if word in own}
    return replace(attack, **few)


every = pytest.mark.parametrize(("name", "fields", "norm"), cases())
own = pytest.mark.parametrize(("name", "fields", "norm"), cases(own=True))


# The checks are robustkit.testing's; one more is for attacks whose cost is exactly steps and restarts.


def check_steps_count(attack, problem, norm):
    """On a hopeless problem `steps` steps cost steps + 1 forwards and steps backwards a row and restart."""
    threat = threat_at(problem, norm, 0.9)
    for steps, restarts in ((1, 1), (3, 1), (7, 1), (2, 3)):
        tried = replace(attack, steps=steps, restarts=restarts)
        forwards, backwards = count_passes(tried, problem, threat)
        rows = len(problem.x) * restarts
        assert (forwards, backwards) == (rows * (steps + 1), rows * steps)


# The registered attacks.


def problems_of(name):
    return [problem for problem in PROBLEMS if problem != "sphere" or name not in PLANES_ONLY]


def coupled(name):
    return registry.catalog("attack")[name if not name.startswith("foolbox:") else "foolbox"].info.coupled


@every
@pytest.mark.parametrize("problem", PROBLEMS)
def test_succeeds_where_possible(name, fields, norm, problem):
    if problem not in problems_of(name):
        pytest.skip("one step reaches planes only")
    factor = SLACK.get((name, norm), 1.5)
    check_succeeds(make(name, **fields), PROBLEMS[problem](), norm, coupled=coupled(name), factor=factor)


@every
@pytest.mark.parametrize("problem", PROBLEMS)
def test_fails_where_impossible(name, fields, norm, problem):
    check_fails(make(name, **fields), PROBLEMS[problem](), norm, coupled=coupled(name))


@every
def test_one_image_is_enough(name, fields, norm):
    problem = plane(3).rows(torch.tensor([1]))
    check_succeeds(make(name, **fields), problem, norm, coupled=coupled(name), factor=SLACK.get((name, norm), 1.5))


@every
def test_the_same_seed_gives_the_same_bytes(name, fields, norm):
    problem = sphere()
    check_repeatable(brief(name, fields), problem, threat_at(problem, norm, 0.9))


@every
def test_no_side_effects(name, fields, norm):
    problem = plane(3)
    threat = threat_at(problem, norm, 1.5)
    check_no_side_effects(make(name, **fields), problem, threat, trainable=not coupled(name))


def test_decision_attacks_use_labels_only():
    problem = plane(3)
    for name, entry in registry.catalog("attack").items():
        if entry.info.access == "decision":
            for norm in entry.info.norms:
                # Where nothing is found the point of the highest margin is returned, which scores decide.
                threat = threat_at(problem, norm, SLACK.get((name, norm), 1.5))
                check_labels_only(make(name, **FIELDS.get(name, {})), problem, threat)
    with pytest.raises(AssertionError, match="more than the predicted labels"):
        check_labels_only(make("square", queries=40), problem, threat_at(problem, "linf", 0.9))


@own
@pytest.mark.parametrize("factor", [0.9, 1.5])
def test_result_is_independent_of_the_batch(name, fields, norm, factor):
    problem = plane(5)
    check_row_independent(brief(name, fields), problem, threat_at(problem, norm, factor))


@own
def test_no_global_generator_moves(name, fields, norm):
    problem = plane(3)
    check_global_generators(brief(name, fields), problem, threat_at(problem, norm, 0.9))


@own
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("corner", [False, True])
def test_dtype_is_kept_and_the_box_too(name, fields, norm, dtype, corner):
    problem = plane(3).to(dtype)
    if corner:  # anchors on the corners of the box and a radius that leaves it
        problem = replace(problem, x=problem.x.gt(0.5).to(dtype))
    threat = ThreatModel.parse({"linf": "linf:0.3", "l2": "l2:3", "l1": "l1:20"}[norm])
    check_inside(run(make(name, **fields), problem, threat), problem.x, threat)


@own
def test_targeted_succeeds_and_fails(name, fields, norm):
    problem = plane(5, targeted=True)
    check_succeeds(make(name, **fields), problem, norm, factor=max(1.6, SLACK.get((name, norm), 0)))
    check_fails(make(name, **fields), problem, norm)


@own
def test_passes_are_those_of_the_budget(name, fields, norm):
    attack = make(name, **fields)
    if not isinstance(attack, RowWise):
        pytest.skip("no iterative attack")
    check_budget(attack, plane(5), norm)


@own
def test_zero_eps_returns_the_clean_images(name, fields, norm):
    problem = plane(3)
    assert torch.equal(run(make(name, **fields), problem, ThreatModel.parse(f"{norm}:0")), problem.x)


@own
def test_inputs_with_requires_grad_and_callers_under_no_grad(name, fields, norm):
    problem = plane(3)
    threat = threat_at(problem, norm, 0.9)
    expected = run(brief(name, fields), problem, threat)
    wanting = problem.x.clone().requires_grad_()
    found = brief(name, fields)(problem.model, wanting, problem.goal, threat, rng=rng_of(problem))
    assert not found.requires_grad
    assert torch.equal(found, expected)
    with torch.no_grad():
        assert torch.equal(run(brief(name, fields), problem, threat), expected)


@own
def test_logits_that_are_not_finite_are_no_success(name, fields, norm):
    problem = plane(3)
    threat = threat_at(problem, norm, 0.9)

    def broken(x):
        logits = problem.model(x)
        return torch.where((x == problem.x[:1]).flatten(1).all(1)[:, None], logits, logits * torch.nan)

    found = run(brief(name, fields), replace(problem, model=broken), threat)
    assert found.shape == problem.x.shape


@own
def test_rows_at_different_restarts_start_as_they_do_alone(name, fields, norm):
    """A continuous batch mixes rows of all restarts, whose numbers are then a tensor."""
    if not issubclass(registry.find("attack", name), RowWise):
        return
    more = {"restarts": 2} if "restarts" in spec(make(name)) else {}
    attack = make(name, **{**fields, **more})
    x = torch.rand(SHAPE, generator=torch.Generator().manual_seed(3))
    goal, threat = Goal(torch.arange(5) % 3), ThreatModel.parse(f"{norm}:0.5")
    rng = RowRng(0, name, torch.arange(5))
    restart = torch.tensor([0, 1, 1, 0, 1])
    mixed = attack.init(Rows(x, goal, threat, rng.at(restart=restart), goal))
    alone = [attack.init(Rows(x, goal, threat, rng.at(restart=number), goal)) for number in (0, 1)]
    for key, values in mixed.items():
        expected = torch.stack([alone[number][key][row] for row, number in enumerate(restart.tolist())])
        assert torch.equal(values, expected)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["fmn", "fab", "fab-t"])
@pytest.mark.parametrize("problem", ["five planes", "sphere"])
def test_minimum_norm_attacks_end_at_the_boundary(name, norm, problem):
    check_succeeds(make(name, restarts=1), PROBLEMS[problem](), norm, factor=1.01)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
@pytest.mark.parametrize("problem", ["two planes", "five planes"])
def test_pgd_and_fgsm_with_every_loss(norm, loss, problem):
    for name in ("pgd", "fgsm"):
        check_succeeds(make(name, loss=loss), PROBLEMS[problem](), norm)


# The loop that row-wise attacks share.


@pytest.mark.parametrize("norm", NORMS)
def test_pgd_takes_the_stated_number_of_steps(norm):
    check_steps_count(make("pgd"), plane(3), norm)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", [0, 5])
def test_the_loop_ends_when_no_row_is_active(norm, size):
    problem = plane(3).rows(torch.arange(size))
    threat = ThreatModel.parse({"linf": "linf:0.3", "l2": "l2:3", "l1": "l1:20"}[norm])
    attack = make("pgd", steps=1, restarts=3, step_size=1, density=0.3, random_start=False)
    found = run(attack, problem, threat)
    assert found.shape == problem.x.shape
    assert problem.goal.reached(problem.model(found)).all()
    forwards, backwards = count_passes(attack, problem, threat)
    assert (forwards, backwards) == (2 * size, size)


def test_pgd_keeps_the_highest_loss_of_all_restarts():
    problem = plane(5)
    threat = threat_at(problem, "linf", 0.9)
    ends = [run(make("pgd", steps=2, step_size="0.1eps", restarts=n), problem, threat) for n in (1, 5)]
    one, five = (problem.goal.loss(problem.model(end)) for end in ends)
    assert (five >= one).all()
    assert (five > one).any()


@pytest.mark.parametrize(("density", "count"), [(0.01, 2), (0.1, 19), (0.5, 94)])
def test_pgds_density_is_the_share_of_coordinates_that_a_step_moves(density, count):
    problem = plane(3)
    attack = make("pgd", density=density, random_start=False)
    rows = Rows(problem.x, problem.goal, ThreatModel.parse("l1:0.1"), rng_of(problem), problem.goal)
    answer = query(problem.model, problem.x, problem.goal, "ce")
    moved = attack.step(rows, attack.init(rows), answer)["x"] != problem.x
    assert (moved.flatten(1).sum(1) == count).all()


# Parity with foolbox.


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 5 * 7, 12), nn.Tanh(), nn.Linear(12, 5)
    ).to(dtype)


@pytest.mark.parametrize(("norm", "theirs", "eps"), [("linf", "LinfPGD", 1 / 16), ("l2", "L2PGD", 1 / 2)])
def test_pgd_makes_foolboxs_iterates(norm, theirs, eps):
    import foolbox

    model = net().eval()
    x = 0.2 + 0.6 * torch.rand(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    goal = Goal(model(x).argmax(1))
    threat = ThreatModel.parse(f"{norm}:{eps}")
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    criterion = foolbox.criteria.Misclassification(goal.labels)
    ours = make("pgd", step_size=0.25, random_start=False)
    rows = Rows(x, goal, threat, RowRng(0, "p", torch.arange(5)), goal)
    state = ours.init(rows)
    assert torch.equal(state["x"], x)
    for steps in range(1, 9):
        state = ours.step(rows, state, query(model, state["x"], goal, "ce"))
        reference = getattr(foolbox.attacks, theirs)(rel_stepsize=0.25, steps=steps, random_start=False)
        expected = reference.run(wrapped, x, criterion, epsilon=eps)
        torch.testing.assert_close(state["x"], expected, rtol=0, atol=1e-6)
        assert threat.distance(state["x"], x).max().item() == pytest.approx(min(steps / 4, 1) * eps, rel=0.05)


# Mutants: each must be caught.


@dataclass(frozen=True)
class Mutant:
    """A sound projected gradient attack, for others to break."""

    steps: int = 20
    restarts: int = 1
    random_start: bool = True

    def __call__(self, model, x, goal, threat, *, rng):
        best, done = x.clone(), torch.zeros(len(x), dtype=torch.bool)
        for restart in range(self.restarts):
            point = self.start(x, threat, rng.at(restart=restart))
            for step in range(self.count() + 1):
                logits, _, gradient = query(model, point, self.aim(goal), "ce", step < self.count())
                new = goal.reached(logits) & ~done
                best[new], done = point[new], done | new
                best[~done] = point[~done]
                if step < self.count():
                    direction = self.sign() * threat.ascent(gradient, density=0.01)
                    point = self.finish(threat, x, point + 0.15 * float(threat.eps) * direction, step)
        return best

    def start(self, x, threat, rng):
        return threat.random_start(x, rng)

    def count(self):
        return self.steps

    def sign(self):
        return 1

    def aim(self, goal):
        return goal

    def finish(self, threat, x, point, step):
        return threat.project(point, x)


class NoOp(Mutant):
    def __call__(self, model, x, goal, threat, *, rng):
        return x.clone()


class ReturnsInput(Mutant):
    def __call__(self, model, x, goal, threat, *, rng):
        super().__call__(model, x, goal, threat, rng=rng)
        return x


class Downhill(Mutant):
    def sign(self):
        return -1


class LeavesBall(Mutant):
    def finish(self, threat, x, point, step):
        return super().finish(threat, x, point, step) if step < self.steps - 1 else x + (point - x) * 1.01


class LeavesBox(Mutant):
    def __call__(self, model, x, goal, threat, *, rng):
        return x + float(threat.eps) * threat.ascent(query(model, x, goal, "ce")[2])


class GlobalGenerator(Mutant):
    def start(self, x, threat, rng):
        return threat.project(x + float(threat.eps) * torch.randn_like(x), x)


class NumpyGenerator(Mutant):
    def start(self, x, threat, rng):
        return threat.project(x + float(threat.eps) * torch.tensor(np.random.randn(*x.shape)).to(x), x)


class SeededByBatch(Mutant):
    def start(self, x, threat, rng):
        draw = torch.Generator().manual_seed(rng.seed)
        return threat.project(x + float(threat.eps) * torch.randn(x.shape, generator=draw), x)


class NormOfTheBatch(Mutant):
    def finish(self, threat, x, point, step):
        point = super().finish(threat, x, point, step)
        return x + (point - x) * (1 - 0.01 * len(x))


class IgnoresSteps(Mutant):
    def count(self):
        return 20


class IgnoresTargets(Mutant):
    def aim(self, goal):
        return Goal(goal.labels)


class Unseeded(Mutant):
    def start(self, x, threat, rng):
        return super().start(x, threat, replace(rng, seed=0, stream="mine", ids=torch.zeros_like(rng.ids)))


class InPlace(Mutant):
    def __call__(self, model, x, goal, threat, *, rng):
        return x.copy_(super().__call__(model, x, goal, threat, rng=rng)).clone()


class TouchesGradients(Mutant):
    def __call__(self, model, x, goal, threat, *, rng):
        goal.loss(model(x)).sum().backward()
        return super().__call__(model, x, goal, threat, rng=rng)


class LeavesEvalMode(Mutant):
    def __call__(self, model, x, goal, threat, *, rng):
        return super().__call__(model.eval(), x, goal, threat, rng=rng)


class LeavesHook(Mutant):
    def __call__(self, model, x, goal, threat, *, rng):
        model.register_forward_hook(lambda *_: None)
        return super().__call__(model, x, goal, threat, rng=rng)


class CarriesMomentum(Mutant):
    """The momentum of one call is where the next begins."""

    kept: ClassVar[dict[Any, Any]] = {}

    def finish(self, threat, x, point, step):
        velocity = 0.5 * self.kept.get(x.shape, torch.zeros_like(x)) + (point - x)
        self.kept[x.shape] = velocity
        return super().finish(threat, x, x + velocity, step)


class Downcasts(Mutant):
    def __call__(self, model, x, goal, threat, *, rng):
        return super().__call__(model, x, goal, threat, rng=rng).float()


def every_check(attack, norm):
    """Run all checks of an own attack."""
    problem = plane(5)
    near, far = threat_at(problem, norm, 1.5), threat_at(problem, norm, 0.9)
    for made in PROBLEMS.values():
        check_succeeds(attack, made(), norm)
        check_fails(attack, made(), norm)
    check_succeeds(attack, plane(5, targeted=True), norm, factor=1.6)
    check_repeatable(attack, sphere(), threat_at(sphere(), norm, 0.9))
    check_row_independent(attack, problem, far)
    check_global_generators(attack, problem, far)
    check_no_side_effects(attack, plane(5), near)
    check_steps_count(attack, problem, norm)
    corner = replace(problem.to(torch.float64), x=problem.x.gt(0.5).double())
    check_inside(run(attack, corner, near), corner.x, near)


@pytest.mark.parametrize("norm", NORMS)
def test_the_attack_that_mutants_change_passes_every_check(norm):
    every_check(Mutant(), norm)


def in_the_corners(norm):
    return corners(plane(3).to(torch.float64), norm)


def inside_in_the_corners(attack, norm):
    problem, threat = in_the_corners(norm)
    check_inside(run(attack, problem, threat), problem.x, threat)


@pytest.mark.parametrize(
    ("mutant", "check"),
    [
        (NoOp, lambda a, n: check_succeeds(a, plane(2), n)),
        (ReturnsInput, lambda a, n: check_succeeds(a, plane(2), n)),
        (Downhill, lambda a, n: check_succeeds(a, plane(2), n)),
        (Downhill, lambda a, n: check_succeeds(a, sphere(), n)),
        (LeavesBall, lambda a, n: check_fails(a, plane(3), n)),
        (LeavesBox, inside_in_the_corners),
        (GlobalGenerator, lambda a, n: check_global_generators(a, *unreachable_problem(n))),
        (NumpyGenerator, lambda a, n: check_global_generators(a, *unreachable_problem(n))),
        (SeededByBatch, lambda a, n: check_row_independent(a, *unreachable_problem(n))),
        (NormOfTheBatch, lambda a, n: check_row_independent(a, *unreachable_problem(n))),
        (IgnoresSteps, lambda a, n: check_steps_count(a, plane(3), n)),
        (IgnoresTargets, lambda a, n: check_succeeds(a, plane(5, targeted=True), n, factor=1.6)),
        (Unseeded, lambda a, n: check_repeatable(a, *unreachable_problem(n))),
        (InPlace, lambda a, n: check_no_side_effects(a, *unreachable_problem(n))),
        (TouchesGradients, lambda a, n: check_no_side_effects(a, *unreachable_problem(n))),
        (LeavesEvalMode, lambda a, n: check_no_side_effects(a, *unreachable_problem(n))),
        (LeavesHook, lambda a, n: check_no_side_effects(a, *unreachable_problem(n))),
        (CarriesMomentum, lambda a, n: check_repeatable(replace(a, steps=2), *unreachable_problem(n))),
        (Downcasts, inside_in_the_corners),
    ],
)
@pytest.mark.parametrize("norm", NORMS)
def test_mutants_are_caught(mutant, check, norm):
    with pytest.raises(AssertionError):
        check(mutant(), norm)


def unreachable_problem(norm):
    problem = plane(3)
    return problem, threat_at(problem, norm, 0.9)
