"""Square's schedule, patterns and proposals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from robustkit.attack_api import Answer, Rows
from robustkit.attacks.score.square import pattern, window_side
from robustkit.core.criteria import Goal
from robustkit.core.rng import RowRng
from robustkit.core.threat import ThreatModel
from robustkit.registry import make

pytestmark = pytest.mark.every_norm
EPS = {"linf": "linf:0.03", "l2": "l2:0.5", "l1": "l1:4"}


def official(norm):
    from pyautoattack.square import SquareAttack

    return SquareAttack(None, norm={"linf": "Linf", "l2": "L2", "l1": "L1"}[norm], eps=1, resc_schedule=False)


def side_by_hand(p, size, norm):
    height, width = size
    side = max(round((p * height * width) ** 0.5), 1 if norm == "linf" else 3)
    return min(side + (norm != "linf" and side % 2 == 0), height, width)


@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("size", [(32, 32), (224, 224), (28, 28), (7, 9), (1, 5), (2, 2)])
def test_the_windows_shrink_as_in_autoattack(norm, size):
    proposals = np.array([0, 9, 10, 11, 50, 51, 200, 201, 500, 501, 1000, 1001, 2001, 4001, 6001, 8001, 9999])
    found = window_side(proposals, 0.8, size, norm)
    shares = [official(norm).p_selection(number) for number in proposals.tolist()]
    assert found.tolist() == [side_by_hand(share, size, norm) for share in shares]


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("side", [1, 3, 5, 7, 13, 27])
def test_the_pattern_is_the_authors(norm, side, monkeypatch):
    reference = official(norm)
    reference.device = "cpu"
    monkeypatch.setattr(torch, "rand", lambda *shape: torch.zeros(*shape))  # upright
    expected = reference.eta(side) if side > 1 else torch.full((1, 1), -1.0)
    ticks = torch.arange(-2, side + 2)
    found = pattern(ticks[:, None], ticks[None, :], torch.tensor(side), norm)
    torch.testing.assert_close(found[2:-2, 2:-2], expected.double(), rtol=1e-5, atol=1e-6)
    outside = torch.ones_like(found, dtype=torch.bool)
    outside[2:-2, 2:-2] = False
    assert (found[outside] == 0).all()


def rows_of(norm, shape, seed=0):
    x = 0.2 + 0.6 * torch.rand(shape, generator=torch.Generator().manual_seed(1))
    goal = Goal(torch.zeros(len(x), dtype=torch.int64))
    return Rows(x, goal, ThreatModel.parse(EPS[norm]), RowRng(seed, "square", torch.arange(len(x))), goal)


def step(attack, rows, number, state, scores):
    rows = replace(rows, rng=rows.rng.at(step=number))
    return attack.step(rows, state, answer(rows, scores))


def answer(rows, scores):
    return Answer(torch.zeros(len(rows.x), 2), torch.tensor(scores), torch.zeros_like(rows.x))


@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("shape", [(5, 3, 7, 9), (4, 3, 32, 32), (2, 1, 1, 1), (2, 1, 1, 6), (3, 2, 14, 4)])
def test_proposals_of_any_size_are_inside_and_near_the_radius(norm, shape):
    rows, attack = rows_of(norm, shape), make("square")
    state = attack.init(rows)
    for number in range(60):
        assert rows.threat.contains(state["x"], rows.x).all()
        assert state["x"].isfinite().all()
        state = step(attack, rows, number + 1, state, [float(number % 3)] * shape[0])
    length = rows.threat.distance(state["x"], rows.x)
    if shape[2] > 1 and norm != "l1":
        assert (length > 0.5 * float(rows.threat.eps)).all()


@pytest.mark.parametrize("norm", EPS)
def test_a_proposal_changes_windows_of_the_best_point_only(norm):
    rows, attack = rows_of(norm, (6, 3, 20, 20)), make("square")
    state = attack.init(rows)
    first = step(attack, rows, 5001, state, [1.0] * 6)
    assert torch.equal(first["best"], state["x"])
    worse = step(attack, rows, 5002, first, [0.5] * 6)
    assert torch.equal(worse["best"], state["x"])
    better = step(attack, rows, 5002, first, [1.0, 2.0] * 3)
    assert torch.equal(better["best"][1::2], first["x"][1::2])
    assert torch.equal(better["best"][::2], state["x"][::2])
    if norm == "linf":
        changed = (first["x"] != first["best"]).any(1)
        side = window_side(np.array([5000]), 0.8, (20, 20), norm).item()
        assert (changed.flatten(1).sum(1) <= side**2).all()
        corners = [tuple(mask.nonzero()[0].tolist()) for mask in changed if mask.any()]
        assert len(set(corners)) > 1, "rows share a window"


def test_windows_reach_every_pixel():
    rows, attack = rows_of("linf", (400, 1, 4, 5)), make("square")
    state = step(attack, rows, 5001, attack.init(rows), [1.0] * 400)
    assert (state["x"] != state["best"]).any(0).all()


def test_patience_depends_on_the_margin_that_gradients_reached():
    x = torch.full((5, 1, 6, 7), 0.5)
    labels = torch.zeros(5, dtype=torch.int64)
    # The clean margin is -2 everywhere; gradients came to -1, but for the last row, where they came nowhere.
    past = torch.tensor([[-2.0, -1.0]] * 4 + [[-2.0, -2.0]], dtype=torch.float64)
    rng = RowRng(0, "square", torch.arange(5))
    rows = Rows(x, Goal(labels), ThreatModel.parse("linf:0.1"), rng, Goal(labels), past)
    attack = make("square", queries=5000, patience=100, rivalry=0.6)
    reached = torch.tensor([-1.5, -1.3, -1.0, -0.5, -2.0], dtype=torch.float64)

    def leaving(clock):
        state = {**attack.init(rows), "score": reached}
        return step(attack, rows, clock + 1, state, [-9.0] * 5)["last"].tolist()

    assert leaving(50) == [False] * 5
    assert leaving(98) == [True, False, False, False, False]
    assert leaving(998) == [True, True, False, False, False]
