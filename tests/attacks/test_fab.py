"""FAB's projection onto a plane within the box, against optimisers that know nothing of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy import optimize

from robustkit.attack_api import Rows
from robustkit.attacks.gradient.fab import DUAL, ORDER, to_plane
from robustkit.core.criteria import Goal
from robustkit.registry import make

pytestmark = pytest.mark.every_norm
NORMS = ("linf", "l2", "l1")
UNUSED: Any = None


def case(count, size, seed, *, reach):
    """Return points, weights and values whose planes lie at `reach` of what the box allows."""
    draw = torch.Generator().manual_seed(seed)
    points = torch.rand(count, size, generator=draw, dtype=torch.float64)
    points = torch.where(torch.rand(count, size, generator=draw) < 0.2, points.round(), points)
    weight = torch.randn(count, size, generator=draw, dtype=torch.float64)
    weight = torch.where(torch.rand(count, size, generator=draw) < 0.2, 0.0, weight)
    up = torch.where(weight > 0, 1 - points, points) * weight.abs()
    down = torch.where(weight > 0, points, 1 - points) * weight.abs()
    below = torch.arange(count) % 2 == 0
    return points, weight, torch.where(below, -reach * up.sum(1), reach * down.sum(1))


def shortest(point, weight, value, norm):
    """Return the least length of a shift onto the plane in the box, by linear or quadratic programming."""
    size, bounds = len(point), [(-p, 1 - p) for p in point.tolist()]
    if norm == "l2":
        start = torch.zeros(size).numpy()
        constraint = {
            "type": "eq",
            "fun": lambda d: float(value) + weight.numpy() @ d,
            "jac": lambda d: weight.numpy(),
        }
        found = optimize.minimize(
            lambda d: d @ d,
            start,
            jac=lambda d: 2 * d,
            bounds=bounds,
            constraints=[constraint],
            method="SLSQP",
            tol=1e-14,
        )
        assert found.success
        return found.fun**0.5
    # Variables: the shift, then a bound on its coordinates' sizes (linf) or one for each (l1).
    extra = 1 if norm == "linf" else size
    cost = torch.cat([torch.zeros(size), torch.ones(extra)]).numpy()
    eye, bound = torch.eye(size), -torch.ones(size, 1) if norm == "linf" else -torch.eye(size)
    rows = torch.cat([torch.cat([eye, bound], 1), torch.cat([-eye, bound], 1)]).numpy()
    plane = torch.cat([weight, torch.zeros(extra)])[None].numpy()
    found = optimize.linprog(
        cost, rows, torch.zeros(2 * size).numpy(), plane, [-float(value)], bounds + [(0, None)] * extra
    )
    assert found.success
    return found.fun


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("reach", [0.0, 1e-3, 0.3, 0.9, 0.999])
def test_shifts_are_the_shortest(norm, reach):
    points, weight, value = case(8, 7, 5, reach=reach)
    shift = to_plane(points, weight, value, norm)
    assert (points + shift >= -1e-12).all()
    assert (points + shift <= 1 + 1e-12).all()
    torch.testing.assert_close((weight * shift).sum(1), -value, rtol=1e-9, atol=1e-9)
    length = torch.linalg.vector_norm(shift, ORDER[norm], dim=1)
    for row in range(8):
        best = shortest(points[row], weight[row], value[row], norm)
        assert length[row].item() == pytest.approx(best, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_planes_out_of_reach_end_in_a_corner(norm):
    points, weight, value = case(6, 9, 1, reach=1.5)
    ends = points + to_plane(points, weight, value, norm)
    downhill = torch.where(value < 0, 1.0, -1.0)[:, None] * weight
    torch.testing.assert_close(ends, torch.where(weight == 0, points, (downhill > 0).double()))


@pytest.mark.parametrize("norm", NORMS)
def test_without_the_box_the_shift_is_the_dual_norms_formula(norm):
    draw = torch.Generator().manual_seed(2)
    points, weight = torch.full((5, 40), 0.5), torch.randn(5, 40, generator=draw)
    value = torch.tensor([0.1, -0.1, 0.01, 0.3, -0.3])
    length = torch.linalg.vector_norm(to_plane(points, weight, value, norm), ORDER[norm], dim=1)
    dual = torch.linalg.vector_norm(weight, DUAL[norm], dim=1)
    torch.testing.assert_close(length, value.abs() / dual, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("norm", NORMS)
def test_rows_without_gradient_do_not_move_and_rows_are_independent(norm):
    points, weight, value = case(6, 9, 3, reach=0.4)
    weight[2] = 0
    shift = to_plane(points, weight, value, norm)
    assert (shift[2] == 0).all()
    assert shift.isfinite().all()
    for row in range(6):
        alone = to_plane(points[row : row + 1], weight[row : row + 1], value[row : row + 1], norm)
        assert torch.equal(alone[0], shift[row])


@pytest.mark.parametrize("norm", NORMS)
def test_float32_of_an_images_size(norm):
    points, weight, value = (part.float() for part in case(4, 3072, 4, reach=0.05))
    shift = to_plane(points, weight, value, norm)
    assert shift.dtype == torch.float32
    exact = to_plane(points.double(), weight.double(), value.double(), norm)
    torch.testing.assert_close((weight * shift).sum(1), -value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        torch.linalg.vector_norm(shift, ORDER[norm], dim=1).double(),
        torch.linalg.vector_norm(exact, ORDER[norm], dim=1),
        rtol=1e-4,
        atol=0,
    )


def test_a_targets_margin_is_exact_and_its_gradient_is_shared_by_tied_classes():
    logits = torch.tensor(
        [[4.0, 4.0, 1.0, -9.0], [4.0, 0.0, 1.0, -9.0], [0.0, 2.5, 3.0, -9.0]], requires_grad=True
    )
    rows = Goal(torch.tensor([0, 0, 0]), torch.tensor([2, 2, 2]))
    lead = make("fab-t").objective(Rows(UNUSED, rows, UNUSED, UNUSED, rows), {}, logits)
    assert lead[:, 0].tolist() == [-3.0, -3.0, 0.5]
    (slope,) = torch.autograd.grad(lead.sum(), logits)
    expected = torch.tensor([[-0.5, -0.5, 1.0, 0.0], [-1.0, 0.0, 1.0, 0.0], [0.0, -1.0, 1.0, 0.0]])
    torch.testing.assert_close(slope, expected, rtol=0, atol=0.02)


def test_a_tie_of_the_target_has_a_finite_gradient():
    logits = torch.tensor([[2.0, 2.0, 2.0]], requires_grad=True)
    goal = Goal(torch.tensor([0]), torch.tensor([1]))
    lead = make("fab").objective(Rows(UNUSED, goal, UNUSED, UNUSED, goal), {}, logits)
    assert lead.item() == 0
    assert torch.autograd.grad(lead.sum(), logits)[0].tolist() == [[-0.5, 1.0, -0.5]]
