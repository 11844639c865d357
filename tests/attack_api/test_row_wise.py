"""The loop that iterative attacks share: jobs, targets, draws, rows without gradient, rows that end early."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from robustkit.attack_api import Answer, LoopOptions, Rows, RowWise, query, rank
from robustkit.attack_api.driver import run_attempts
from robustkit.attacks.gradient.apgd import APGD
from robustkit.core.criteria import Goal
from robustkit.core.rng import RowRng
from robustkit.core.threat import ThreatModel
from robustkit.registry import make


def images(count=4):
    return 0.3 + 0.4 * torch.rand(count, 1, 2, 3, generator=torch.Generator().manual_seed(0))


class Linear:
    """Logits linear in the image; keeps what it was asked, and whether for a gradient."""

    def __init__(self, classes=4):
        self.weight = torch.randn(classes, 6, generator=torch.Generator().manual_seed(1))
        self.calls = []

    def __call__(self, x):
        self.calls.append((len(x), x.requires_grad))
        return x.flatten(1) @ self.weight.T


@dataclass(frozen=True)
class Drift(RowWise):
    """Moves a little at each step; notes what it was given."""

    notes: list[Any]
    steps: int = 3
    restarts: int = 1
    loss: str = "margin"
    targets: int = 0
    mask: str = ""

    def loop_options(self, norm):
        return LoopOptions(self.steps, self.targets, self.restarts)

    def init(self, rows):
        self.notes.append(
            ("init", rows.rng.restart, None if rows.aim.targets is None else rows.aim.targets.tolist())
        )
        state = {"x": rows.x, "count": torch.zeros(len(rows.x))}
        if self.mask:
            state[self.mask] = torch.full((len(rows.x),), self.mask == "needs_gradient")
        return state

    def step(self, rows, state, answer):
        self.notes.append(("step", rows.rng.step, answer.gradient.flatten(1).abs().sum(1) > 0))
        state = {**state, "x": state["x"] + 1e-4, "count": state["count"] + 1}
        if self.mask == "needs_gradient":
            state["needs_gradient"] = (torch.arange(len(rows.x)) + state["count"].long()) % 2 == 1
        if self.mask == "last":
            state["last"] = rows.rng.ids < state["count"]
        return state


def run(attack, model, x, goal, eps="linf:0.01"):
    return run_attempts(attack, model, x, goal, ThreatModel.parse(eps), RowRng(0, "rows", torch.arange(len(x))))


def right(model, x):
    goal = Goal(model(x).argmax(1))
    model.calls.clear()
    return goal


def test_jobs_are_targets_times_restarts_in_order_of_likelihood():
    model, x = Linear(), images()
    goal, order = right(model, x), model(x).argsort(1, descending=True)
    model.calls.clear()
    attack = Drift([], steps=1, restarts=2, targets=2)
    run(attack, model, x, goal)
    jobs = [note[1:] for note in attack.notes if note[0] == "init"]
    assert jobs == [(job, order[:, 1 + job // 2].tolist()) for job in range(4)]
    assert sum(count for count, _ in model.calls) == 4 * attack.budget(4, "linf") == 4 * (1 + 4 * 2)


def test_a_goals_own_target_is_the_only_one():
    model, x = Linear(), images()
    goal = Goal(right(model, x).labels, model(x).argmin(1))
    attack = Drift([], steps=1, targets=3)
    run(attack, model, x, goal)
    assert [note[1:] for note in attack.notes if note[0] == "init"] == [(0, goal.targets.tolist())]


def test_targets_are_ranked_without_the_label():
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0], [5.0, 1.0, 1.0, 7.0]])
    assert rank(logits, torch.tensor([1, 1]), 9).tolist() == [[2, 0, 3], [3, 0, 2]]
    assert rank(logits, torch.tensor([0, 0]), 1).tolist() == [[1], [3]]


def test_success_is_the_goals_and_not_the_targets():
    x, calls = images(1), []

    def model(x):  # class 1 wins as soon as anything moves; class 2 is ranked first and never does
        calls.append(len(x))
        moved = (x - images(1)).flatten(1).abs().sum(1)
        return torch.stack([1 + 0 * moved, 1e6 * moved - 3, 0 * moved], 1)

    goal = Goal(torch.tensor([0]))
    found = run(Drift([], targets=1), model, x, goal)
    assert len(calls) == 3, "a rank, the clean image, and the first move"
    assert goal.reached(model(found)).all()


def test_rows_wrong_from_the_start_cost_one_forward():
    model, x = Linear(), images()
    goal = Goal((right(model, x).labels + 1) % 4)
    attack = Drift([], targets=2)
    assert torch.equal(run(attack, model, x, goal), x)
    assert model.calls == [(4, False)]
    assert not attack.notes


def test_masked_rows_get_no_gradient_and_the_same_logits():
    model, x = Linear(), images()
    attack = Drift([], steps=4, mask="needs_gradient")
    run(attack, model, x, right(model, x))
    wants = [note[2].tolist() for note in attack.notes if note[0] == "step"]
    assert wants == [[True] * 4, [True, False] * 2, [False, True] * 2, [True, False] * 2]
    assert model.calls == [(4, True), *[(2, False), (2, True)] * 3, (4, False)]


def test_rows_that_request_the_end_end_after_the_next_query():
    model, x = Linear(), images()
    run(Drift([], steps=9, mask="last"), model, x, right(model, x))
    assert [count for count, _ in model.calls] == [4, 4, 3, 2, 1]


@dataclass(frozen=True)
class Far(Drift):
    def loop_options(self, norm):
        return LoopOptions(self.steps, queries_outside_ball=True)

    def step(self, rows, state, answer):
        return {**state, "x": rows.x + 0.2}


def test_points_outside_the_threat_never_count():
    x = images()

    def model(x):
        return torch.stack([1 - (x - images()).flatten(1).abs().amax(1) * 10, 0 * x.flatten(1).sum(1)], 1)

    goal = Goal(torch.zeros(4, dtype=torch.int64))
    assert torch.equal(run(Far([]), model, x, goal), x)
    assert goal.reached(model(run(Far([]), model, x, goal, "linf:0.3"))).all()


def test_an_objective_of_columns_has_a_gradient_each():
    class Both(Drift):
        def objective(self, rows, state, logits):
            return logits

        def step(self, rows, state, answer):
            self.notes.append(answer)
            return state

    model, x = Linear(), images()
    attack = Both([], steps=1)
    run(attack, model, x, right(model, x))
    gradient = attack.notes[-1].gradient
    torch.testing.assert_close(gradient.flatten(2), model.weight.expand(4, 4, 6))


def test_draws_are_averaged():
    model, calls = Linear(), []

    def random(x):
        calls.append(len(x))
        return model(x) * (1 + len(calls) % 2)

    x = images()
    goal = right(model, x)
    seen = []

    class Spy(APGD):
        def step(self, rows, state, answer):
            seen.append(answer)
            return APGD.step(self, rows, state, answer)

    rows_attack = Spy(steps=1, eot_iter=2, loss="margin")
    start = rows_attack.init(
        Rows(x, goal, ThreatModel.parse("linf:0.001"), RowRng(0, "rows", torch.arange(4)), goal)
    )["x"]
    run(rows_attack, random, x, goal, "linf:0.001")
    single = query(model, start, goal, "margin")
    assert isinstance(seen[0], Answer)
    torch.testing.assert_close(seen[0].logits, 1.5 * single.logits)
    torch.testing.assert_close(seen[0].loss, 1.5 * single.loss)
    torch.testing.assert_close(seen[0].gradient, 1.5 * single.gradient)
    assert len(calls) == rows_attack.budget(4, "linf") == 4


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 10, 100])
@pytest.mark.parametrize("large_start", [None, False, True])
def test_apgds_plan_has_an_entry_for_every_query(norm, steps, large_start):
    from robustkit.attacks.gradient.apgd import _plan

    attack = make("apgd", steps=steps, large_start=large_start)
    plan = _plan(steps, norm, large_start)
    assert len(plan) == attack.loop_options(norm).steps + 1
    assert sum(begins for _, begins, _, _ in plan) + steps == len(plan)
    assert plan[-1][0] == 1
    if norm == "l1" and large_start is not False and steps == 100:
        assert [factor for factor, begins, _, _ in plan if begins] == [3, 2, 1]


def test_rows_at_different_steps_have_their_own_random_draws():
    rng = RowRng(0, "steps", torch.arange(3))
    mixed = rng.at(step=torch.tensor([5, 0, 7]))
    for row, step in enumerate((5, 0, 7)):
        assert torch.equal(mixed.uniform(4)[row], rng.at(step=step).uniform(4)[row])
        assert torch.equal(mixed.select(torch.tensor([row])).uniform(4)[0], mixed.uniform(4)[row])


def test_a_row_that_succeeds_is_queried_no_more():
    model, x = Linear(), images(6)
    labels = model(x).argmax(1)
    labels[:4] = (labels[:4] + 1) % 4  # these are where the attacker wants them from the first answer on
    model.calls.clear()
    run_attempts(
        Drift([], steps=5), model, x, Goal(labels), ThreatModel.parse("linf:0.01"), RowRng(0, "t", torch.arange(6))
    )
    assert [count for count, _ in model.calls] == [6, 2, 2, 2, 2, 2]
