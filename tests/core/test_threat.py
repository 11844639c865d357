"""The threat models: written form, membership, projection, steepest ascent, random starts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from robustkit.core.errors import UsageError
from robustkit.core.rng import RowRng
from robustkit.core.threat import L1, L2, Linf, ThreatModel

pytestmark = pytest.mark.every_norm
NORMS = ("linf", "l2", "l1")
KINDS: dict[str, Callable[[Any], ThreatModel]] = {"linf": Linf, "l2": L2, "l1": L1}
SHAPES = ((5, 3, 7, 9), (3, 1, 2, 2), (9, 3, 5, 9), (1, 1, 1, 1), (4, 2, 1, 3))
RADII = {
    "linf": ("0", "1/1000000", "8/255", "0.3", "1"),
    "l2": ("0", "1/1000000", "1/2", "3", "1000"),
    "l1": ("0", "1/1000000", "1/3", "12", "100000"),
}
CASES = [(norm, eps) for norm in NORMS for eps in RADII[norm]]

problems = st.tuples(
    st.sampled_from(CASES),
    st.sampled_from(SHAPES),
    st.sampled_from((torch.float32, torch.float64)),
    st.sampled_from(("inside", "corners", "mixed", "edges")),
    st.sampled_from((0.0, 1e-42, 1e-9, 1e-3, 0.1, 1.0, 1e6)),
    st.integers(0, 2**31),
)


def make(problem):
    """Return threat, clean images and perturbed ones."""
    (norm, eps), shape, dtype, anchors, scale, seed = problem
    draw = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=draw, dtype=dtype)
    if anchors == "corners":
        x = x.round()
    elif anchors == "mixed":
        x = torch.where(torch.rand(shape, generator=draw) < 0.5, x.round(), x)
    elif anchors == "edges":  # a denormal above 0, an ulp below 1
        x = torch.where(x < 0.5, torch.full_like(x, 1e-42), 1 - torch.finfo(dtype).eps / 2)
    shift = torch.randn(shape, generator=draw, dtype=dtype) * scale
    if seed % 2:
        shift = torch.where(torch.rand(shape, generator=draw) < 0.3, torch.zeros_like(shift), shift)
    return ThreatModel.parse(f"{norm}:{eps}"), x, x + shift


def naive(norm, x_adv, x):
    """Return distances as a stranger computes them: numpy, the images' own precision."""
    flat = np.abs(x_adv.numpy() - x.numpy()).reshape(len(x), -1)
    if norm == "linf":
        return flat.max(1)
    return np.sqrt((flat**2).sum(1)) if norm == "l2" else flat.sum(1)


def feasible(norm, eps, x, draw, count):
    """Return random points of ball and box, many on the border; clipping towards x never lengthens."""
    shift = torch.randn((count, *x.shape), generator=draw, dtype=x.dtype)
    if norm == "l1":
        shift = shift * torch.rand(shift.shape, generator=draw) ** 4
    flat = shift.flatten(2)
    length = {"linf": flat.abs().amax(2), "l2": flat.norm(dim=2), "l1": flat.abs().sum(2)}[norm]
    return (x + shift * (eps / length)[..., None, None, None]).clamp(0, 1)


# Written form.


@given(st.sampled_from(NORMS), st.fractions(0, 1))
def test_parse_reads_what_str_writes(norm, eps):
    threat = KINDS[norm](eps)
    assert ThreatModel.parse(str(threat)) == threat
    assert ThreatModel.parse(str(threat)).eps == eps


@pytest.mark.parametrize(
    ("text", "threat"),
    [
        ("linf:8/255", Linf(Fraction(8, 255))),
        (" LINF : 8/255 ", Linf(Fraction(8, 255))),
        ("l2:0.5", L2(Fraction(1, 2))),
        ("l2:.5", L2(Fraction(1, 2))),
        ("l1:12", L1(Fraction(12))),
        ("linf:1e-3", Linf(Fraction(1, 1000))),
        ("linf:0", Linf(Fraction(0))),
    ],
)
def test_parse_spellings(text, threat):
    assert ThreatModel.parse(text) == threat


@pytest.mark.parametrize(
    "text",
    [
        *("", ":", "linf", "linf:", "l3:1", "8/255", "linf:8/0", "linf:x", "linf:nan", "l2:inf"),
        *("l2:-1", "linf:8", "l2 0.5", "l2:1:2", "linf:1/2/3", "l1:1e400", "l2:1e10"),
    ],
)
def test_bad_threats_get_one_sentence(text):
    with pytest.raises(UsageError) as caught:
        ThreatModel.parse(text)
    message = str(caught.value)
    assert message.startswith("threat ")
    assert message[-1] in ".?"
    assert "\n" not in message
    assert len(message) < 200


def test_linf_eps_of_eight_asks_about_the_missing_255():
    with pytest.raises(UsageError, match=r"did you mean linf:8/255\?"):
        ThreatModel.parse("linf:8")


def test_threats_are_values():
    assert Linf(Fraction(8, 255)) == ThreatModel.parse("linf:8/255")
    assert len({Linf(Fraction(1, 2)), Linf(Fraction(1, 2)), L2(Fraction(1, 2))}) == 2
    threat: Any = Linf(Fraction(1, 2))
    with pytest.raises(AttributeError):
        threat.eps = Fraction(1)


@pytest.mark.parametrize("norm", NORMS)
def test_a_radius_per_sample_is_refused(norm):
    # captum's mistake: a radius of shape (B,) multiplies along the width.
    with pytest.raises((TypeError, ValueError)):
        KINDS[norm](torch.full((9,), 0.5))


# Membership.


@pytest.mark.parametrize("norm", NORMS)
def test_contains_box_and_nan(norm):
    threat = KINDS[norm](Fraction(1))
    x = torch.full((6, 3, 7, 9), 0.0)
    x_adv = x.clone()
    x_adv[1, 0, 0, 0] = -1e-45
    x_adv[2, 0, 0, 0] = math.nan
    x_adv[3, 0, 0, 0] = 1
    x_adv[4, 0, 0, 0] = 1 + 2**-23
    x_adv[5, 0, 0, 0] = math.inf
    assert threat.contains(x_adv, x).tolist() == [True, False, False, True, False, False]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("eps", [Fraction(8, 255), Fraction(1, 3), Fraction(1, 2), Fraction(1, 10**6)])
def test_contains_never_grants_more_than_eps(norm, eps):
    threat = KINDS[norm](eps)
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    edge = float(eps)
    edge = edge if Fraction(edge) <= eps else math.nextafter(edge, 0)
    over = math.nextafter(edge, 1)
    assert not threat.contains(x + over, x).item()
    granted = threat.project(x + 1, x).item()
    assert Fraction(granted) <= eps
    assert granted == pytest.approx(float(eps), rel=2e-7)


@pytest.mark.parametrize("norm", NORMS)
def test_radius_does_not_hang_on_torchs_default_dtype(norm):
    threat = KINDS[norm](Fraction(8, 255))
    x = torch.full((2, 3, 7, 9), 0.5)
    expected = threat.project(x + 0.4, x)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(threat.project(x + 0.4, x), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_distance_closed_forms():
    x = torch.zeros(2, 1, 1, 2)
    x_adv = torch.tensor([[0.75, 1.0], [0.0, 0.5]]).view(2, 1, 1, 2)
    assert Linf(Fraction(1)).distance(x_adv, x).tolist() == [1.0, 0.5]
    assert L2(Fraction(1)).distance(x_adv, x).tolist() == [1.25, 0.5]
    assert L1(Fraction(1)).distance(x_adv, x).tolist() == [1.75, 0.5]
    assert Linf(Fraction(1)).diameter((3, 7, 9)) == 1
    assert L2(Fraction(1)).diameter((3, 7, 9)) == math.sqrt(189)
    assert L1(Fraction(1)).diameter((3, 7, 9)) == 189


# Projection.


@settings(max_examples=300)
@given(problems)
def test_projection_ends_inside_and_is_idempotent(problem):
    threat, x, x_adv = make(problem)
    given_x, given_adv = x.clone(), x_adv.clone()
    inside = threat.contains(x_adv, x)
    once = threat.project(x_adv, x)
    assert once.dtype == x.dtype
    assert once.shape == x.shape
    assert threat.contains(once, x).all()
    assert torch.equal(threat.project(once, x), once)
    assert torch.equal(once[inside], x_adv[inside])
    assert torch.equal(x, given_x)
    assert torch.equal(x_adv, given_adv)
    if threat.eps == 0:
        assert torch.equal(once, x)
    slack = 0 if threat.norm == "linf" else 1e-5
    assert (naive(threat.norm, once, x) <= float(threat.eps) * (1 + slack)).all()


@settings(max_examples=100)
@given(problems)
def test_projection_treats_rows_one_by_one(problem):
    threat, x, x_adv = make(problem)
    together = threat.project(x_adv, x)
    alone = torch.cat([threat.project(x_adv[i : i + 1], x[i : i + 1]) for i in range(len(x))])
    assert torch.equal(together, alone)
    back = threat.project(x_adv.flip(0), x.flip(0)).flip(0)
    assert torch.equal(together, back)


@settings(max_examples=100)
@given(problems)
def test_no_feasible_point_is_nearer(problem):
    # The projection p of t is the point with <t - p, z - p> <= 0 for every feasible z.
    threat, x, x_adv = make(problem)
    point = threat.project(x_adv, x)
    draw = torch.Generator().manual_seed(problem[-1] + 1)
    others = feasible(threat.norm, float(threat.eps), x, draw, 40).double()
    away = x_adv.double() - point.double()
    product = (away * (others - point.double())).flatten(2).sum(2)
    moved = (others - x.double()).flatten(2).norm(dim=2)
    ulp = torch.finfo(x.dtype).eps * math.sqrt(x[0].numel())
    size = away.flatten(1).norm(dim=1)
    assert (product <= size * (4 * moved * 1e-6 + 4 * ulp)).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("seed", range(12))
def test_projection_against_slsqp(norm, seed):
    draw = np.random.default_rng(seed)
    x = draw.random(4)
    x[seed % 4] = seed % 2
    target = x + draw.normal(size=4) * (0.2, 1.0, 5.0)[seed % 3]
    eps = {"linf": 0.25, "l2": 0.5, "l1": 0.75}[norm]
    if norm == "linf":
        rules = [{"type": "ineq", "fun": lambda p: np.r_[eps - (p - x), eps + (p - x)]}]
    elif norm == "l2":
        rules = [{"type": "ineq", "fun": lambda p: eps**2 - ((p - x) ** 2).sum()}]
    else:
        signs = np.array(list(itertools.product((-1, 1), repeat=4)))
        rules = [{"type": "ineq", "fun": lambda p: eps - signs @ (p - x)}]
    reference = optimize.minimize(
        lambda p: ((p - target) ** 2).sum(),
        x,
        jac=lambda p: 2 * (p - target),
        bounds=[(0, 1)] * 4,
        constraints=rules,
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-14},
    ).x
    threat = ThreatModel.parse(f"{norm}:{eps}")
    ours = threat.project(torch.tensor(target).view(1, 1, 2, 2), torch.tensor(x).view(1, 1, 2, 2))
    np.testing.assert_allclose(ours.numpy().ravel(), reference, atol=2e-5)


def bisected(norm, shift, low, high, eps):
    """Return the nearest shift by bisection on the one multiplier, in numpy."""

    def point_at(t):
        if norm == "l2":
            return np.clip(shift / (1 + t), low, high)
        return np.clip(np.sign(shift) * np.maximum(np.abs(shift) - t, 0), low, high)

    def length(t):
        return np.linalg.norm(point_at(t), 2 if norm == "l2" else 1)

    if length(0) <= eps:
        return point_at(0)
    above, below = 0.0, 1.0
    while length(below) > eps:
        below *= 2
    for _ in range(200):
        middle = (above + below) / 2
        above, below = (middle, below) if length(middle) > eps else (above, middle)
    return point_at(below)


@settings(max_examples=100)
@given(problems.filter(lambda p: p[0][0] != "linf"))
def test_projection_against_bisection(problem):
    problem = (*problem[:2], torch.float64, *problem[3:])
    threat, x, x_adv = make(problem)
    ours = threat.project(x_adv, x)
    for i in range(len(x)):
        clean = x[i].numpy().ravel()
        shift = x_adv[i].numpy().ravel() - clean
        reference = clean + bisected(threat.norm, shift, -clean, 1 - clean, float(threat.eps))
        np.testing.assert_allclose(ours[i].numpy().ravel(), reference, atol=1e-7, rtol=0)


@settings(max_examples=60)
@given(problems)
def test_a_radius_per_row_is_that_rows_own(problem):
    threat, x, x_adv = make(problem)
    share = torch.linspace(0, 1.5, len(x), dtype=torch.float64)
    radius = share * min(float(threat.eps), threat.diameter(x.shape[1:]))
    for method in (threat.project, threat.retract):
        found = method(x_adv, x, radius)
        assert threat.contains(found, x, radius).all()
        assert torch.equal(method(found, x, radius), found)
        for row in range(len(x)):
            alone = method(x_adv[row : row + 1], x[row : row + 1], radius[row : row + 1])
            assert torch.equal(alone[0], found[row])
    assert torch.equal(threat.contains(x_adv, x, radius * 0 + threat.radius), threat.contains(x_adv, x))
    assert torch.equal(threat.project(x_adv, x, radius * 0 + threat.radius), threat.project(x_adv, x))


@settings(max_examples=60)
@given(problems)
def test_retracted_points_are_scaled_and_clipped(problem):
    threat, x, x_adv = make(problem)
    found = threat.retract(x_adv, x)
    assert threat.contains(found, x).all()
    same = threat.contains(x_adv, x)
    assert torch.equal(found[same], x_adv[same])
    if threat.norm != "l2":
        assert torch.equal(found, threat.project(x_adv, x))
        return
    shift = x_adv.double() - x.double()
    length = shift.flatten(1).norm(dim=1).clamp(min=1e-300).view(-1, 1, 1, 1)
    expected = (x + shift * (threat.radius / length).clamp(max=1)).clamp(0, 1)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


def test_ball_and_box_are_met_together_not_in_turn():
    # Ball first, then box, loses length: the free coordinate may still move until the ball is full.
    x = torch.tensor([0.5, 1.0], dtype=torch.float64).view(1, 1, 1, 2)
    x_adv = x + torch.tensor([3.0, 4.0], dtype=torch.float64).view(1, 1, 1, 2)
    for threat in (L2(Fraction(1, 4)), L1(Fraction(1, 4))):
        assert threat.project(x_adv, x).flatten().tolist() == pytest.approx([0.75, 1.0], abs=1e-9)


def test_where_the_box_alone_binds_the_nearest_point_is_its_corner():
    x = torch.tensor([0.9, 0.5], dtype=torch.float64).view(1, 1, 1, 2)
    x_adv = x + torch.tensor([10.0, 0.6], dtype=torch.float64).view(1, 1, 1, 2)
    for threat in (Linf(Fraction(1)), L2(Fraction(1)), L1(Fraction(1))):
        assert threat.project(x_adv, x).flatten().tolist() == [1.0, 1.0]


def test_adversarial_librarys_clamp_mistake():
    x = torch.zeros(2, 1, 1, 2, dtype=torch.float64)
    near = torch.tensor([[0.06, 0.08], [0.6, 0.8]], dtype=torch.float64).view(2, 1, 1, 2)
    assert torch.equal(L2(Fraction(2)).project(near, x), near)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_projection_of_large_images_stays_inside_in_any_order_of_summation(norm):
    threat = KINDS[norm](Fraction(3))
    draw = torch.Generator().manual_seed(0)
    x = torch.zeros(2, 3, 224, 225, dtype=torch.float64)
    point = threat.project(torch.randn(x.shape, generator=draw, dtype=x.dtype).abs(), x)
    for change in (lambda v: v, lambda v: v.flip(3), lambda v: v.transpose(2, 3).contiguous(), lambda v: v[:1]):
        assert threat.contains(change(point), change(x)).all()


@pytest.mark.parametrize("norm", NORMS)
def test_projection_mixed_dtypes_and_memory_formats(norm):
    threat = KINDS[norm](Fraction(1, 3))
    draw = torch.Generator().manual_seed(1)
    x = torch.rand(5, 3, 7, 9, generator=draw)
    noise = torch.randn(x.shape, generator=draw)
    wide = threat.project(x.double() + noise.double() * 1e-3, x)
    assert wide.dtype == torch.float32
    assert threat.contains(wide, x).all()
    last = torch.channels_last
    there = threat.project((x + noise).to(memory_format=last), x.to(memory_format=last))
    assert torch.equal(there, threat.project(x + noise, x))
    for dtype in (torch.float16, torch.bfloat16):
        low = threat.project((x + noise).to(dtype), x.to(dtype))
        assert low.dtype == dtype
        assert threat.contains(low, x.to(dtype)).all()


@pytest.mark.parametrize("norm", NORMS)
def test_empty_batches_pass_through(norm):
    threat = KINDS[norm](Fraction(1, 3))
    x = torch.rand(0, 3, 7, 9)
    assert threat.project(x, x).shape == x.shape
    assert threat.ascent(x).shape == x.shape
    assert threat.random_start(x, RowRng(0, "t", torch.arange(0))).shape == x.shape


# Ascent.


@settings(max_examples=100)
@given(
    st.sampled_from(NORMS),
    st.sampled_from(SHAPES),
    st.sampled_from((torch.float32, torch.float64)),
    st.sampled_from((1e-40, 1e-30, 1e-8, 1.0, 1e8, 1e18)),
    st.integers(0, 2**31),
)
def test_ascent_is_the_steepest_direction_of_unit_length(norm, shape, dtype, scale, seed):
    draw = torch.Generator().manual_seed(seed)
    gradient = torch.randn(shape, generator=draw, dtype=dtype) * scale
    gradient[0] = 0
    given_gradient = gradient.clone()
    threat = KINDS[norm](Fraction(1, 2))
    direction = threat.ascent(gradient)
    assert torch.equal(gradient, given_gradient)
    assert direction.dtype == dtype
    assert torch.equal(direction[0], torch.zeros_like(direction[0]))
    flat = gradient.double().flatten(1)
    dual = {"linf": flat.abs().sum(1), "l2": flat.norm(dim=1), "l1": flat.abs().amax(1)}[norm]
    rise = (flat * direction.double().flatten(1)).sum(1)
    torch.testing.assert_close(rise, dual, rtol=1e-5, atol=0)
    length = threat.distance(direction, torch.zeros_like(direction))
    torch.testing.assert_close(length[1:], torch.ones_like(length[1:]), rtol=1e-5, atol=0)


def test_ascent_of_float64_gradients_far_below_float32():
    gradient = torch.full((2, 1, 1, 3), 1e-200, dtype=torch.float64)
    assert L2(Fraction(1)).ascent(gradient).flatten(1).norm(dim=1).tolist() == pytest.approx([1, 1])


def test_l1_ascent_spreads_over_the_density():
    gradient = torch.arange(1.0, 190.0).view(1, 3, 7, 9) * torch.tensor([1.0, -1.0, 1.0]).view(1, 3, 1, 1)
    for density, count in ((0.0, 1), (0.01, 2), (0.1, 19), (1.0, 189), (2.0, 189)):
        direction = L1(Fraction(1)).ascent(gradient, density=density).flatten()
        moved = direction.nonzero().flatten()
        assert len(moved) == count
        assert moved.min() == 189 - count
        assert direction.abs().sum().item() == pytest.approx(1)
        assert torch.equal(direction[moved].sign(), gradient.flatten()[moved].sign())


@settings(max_examples=25)
@given(st.floats(0.01, 20), st.sampled_from((0.0, 0.1, 1.0)), st.integers(0, 2**31))
def test_l1_steps_are_the_steepest_in_the_box(length, density, seed):
    draw = torch.Generator().manual_seed(seed)
    x = torch.rand(2, 1, 3, 5, generator=draw, dtype=torch.float64)
    gradient = torch.randn(x.shape, generator=draw, dtype=torch.float64)
    gradient[1] = gradient[1].sign() * (torch.rand(x.shape[1:], generator=draw) < 0.7)
    moved = L1(Fraction(1)).step(x, gradient, length, density=density) - x
    assert (moved * gradient >= 0).all()
    room = torch.where(gradient > 0, 1 - x, x) * (gradient != 0)
    for row in range(2):
        most = min(max(1, round(density * 15)), int((gradient[row] != 0).sum()))
        highest = room[row].clamp(max=length / most).flatten().tolist()
        rise = optimize.linprog(
            -gradient[row].abs().flatten().numpy(),
            np.ones((1, 15)),
            [length],
            bounds=[(0, high) for high in highest],
        )
        assert (moved[row] * gradient[row]).sum().item() == pytest.approx(-rise.fun, rel=1e-9)
        assert moved[row].abs().sum().item() <= length * (1 + 1e-12)


def test_l1_ascent_does_not_move_zero_gradients():
    gradient = torch.zeros(1, 1, 2, 5)
    gradient[0, 0, 0, 3] = -2
    assert L1(Fraction(1)).ascent(gradient, density=0.5).flatten().tolist() == [0, 0, 0, -1, 0, 0, 0, 0, 0, 0]


# Random starts.


@pytest.mark.parametrize(("norm", "eps"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_start_is_inside_and_belongs_to_the_row(norm, eps, dtype):
    threat = ThreatModel.parse(f"{norm}:{eps}")
    x = torch.rand(5, 3, 7, 9, generator=torch.Generator().manual_seed(3), dtype=dtype)
    x[0] = x[0].round()
    rng = RowRng(7, "start", torch.tensor([4, 0, 99, 2, 2**40]))
    start = threat.random_start(x, rng)
    assert start.dtype == dtype
    assert threat.contains(start, x).all()
    assert torch.equal(start, threat.random_start(x, rng))
    for i in range(5):
        index = torch.tensor([i])
        assert torch.equal(threat.random_start(x[index], rng.select(index)), start[index])
    if threat.eps > 1e-3:
        assert not torch.equal(start, threat.random_start(x, rng.at(restart=1)))


@pytest.mark.parametrize("norm", NORMS)
def test_random_start_fills_the_ball_evenly(norm):
    # In an even ball the share within radius r is (r / eps)**D.
    count, size, eps = 4000, 6, 0.4
    threat = ThreatModel.parse(f"{norm}:{eps}")
    x = torch.full((count, 1, 2, 3), 0.5)
    shift = (threat.random_start(x, RowRng(0, "even", torch.arange(count))) - x).double()
    radius = threat.distance(x + shift, x) / eps
    assert stats.kstest((radius**size).numpy(), "uniform").pvalue > 1e-3
    flat = shift.flatten(1)
    assert (flat.mean(0).abs() < 4 * flat.std(0) / math.sqrt(count)).all()
    spread = flat.T @ flat / count
    second = {"linf": 1 / 3, "l2": 1 / (size + 2), "l1": 2 / ((size + 1) * (size + 2))}[norm] * eps**2
    torch.testing.assert_close(spread, second * torch.eye(size).double(), rtol=0, atol=0.15 * second)


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("linf:0.3/255", "linf:0.3/255"),
        ("l2:1/850", "l2:0.3/255"),
        ("linf:2.5/255", "linf:2.5/255"),
        ("linf:8/255", "linf:8/255"),
        ("l2:1/6", "l2:1/6"),
        ("linf:17/255", "linf:1/15"),
    ],
)
def test_parts_of_a_level_are_written_over_255(text: str, written: str) -> None:
    assert str(ThreatModel.parse(text)) == written
    assert ThreatModel.parse(written) == ThreatModel.parse(text)
