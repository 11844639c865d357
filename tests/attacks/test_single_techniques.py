"""Techniques against what they are made of: closed forms, written-out compositions, degenerate settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.fft
import scipy.ndimage
import torch
import torch.nn.functional as F
from torch import nn

from robustkit.attack_api import Rows, SurrogateOracle, Surrogates, ascend, compose, split_rng
from robustkit.attacks.transfer.techniques.adaea import AdaEA, agreement
from robustkit.attacks.transfer.techniques.admix import Admix
from robustkit.attacks.transfer.techniques.block_shuffle import BlockShuffle
from robustkit.attacks.transfer.techniques.di import DI, placing
from robustkit.attacks.transfer.techniques.ghost import Ghost
from robustkit.attacks.transfer.techniques.pgn import PGN
from robustkit.attacks.transfer.techniques.rap import RAP
from robustkit.attacks.transfer.techniques.si import SI
from robustkit.attacks.transfer.techniques.smer import SMER
from robustkit.attacks.transfer.techniques.ssa import SSA, cosines
from robustkit.attacks.transfer.techniques.svre import SVRE
from robustkit.attacks.transfer.techniques.ti import TI, band, gaussian
from robustkit.attacks.transfer.techniques.triage import Triage
from robustkit.attacks.transfer.techniques.vmi import VMI
from robustkit.core.criteria import Goal
from robustkit.core.errors import UsageError
from robustkit.core.rng import RowRng
from robustkit.core.step_size import StepSize
from robustkit.core.threat import ThreatModel
from robustkit.registry import make, make_technique, parse_attack

SHAPE = (5, 3, 8, 10)
LINF = ThreatModel.parse("linf:0.1")
UNUSED: Any = None


class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(5 * 6 * 8, 4))
        self.double().requires_grad_(False)

    def forward(self, x):
        return self.body(4 * (x - 0.5))


def images(seed=0, shape=SHAPE):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(threat=LINF, seed=0, members=2):
    x = images(seed)
    surrogates = Surrogates([Net(number) for number in range(members)], pool=images(7, (11, *SHAPE[1:])))
    goal = Goal(surrogates(x).argmax(1))
    return surrogates, Rows(x, goal, threat, RowRng(0, "unit", torch.arange(3, 8), step=1), goal)


def gradient(technique, surrogates, rows, x=None):
    prepared = technique.prepare(surrogates)
    return technique.wrap(SurrogateOracle(prepared, "ce")).gradient(rows, rows.x if x is None else x)


def run(text, surrogates, rows, *techniques):
    rule, *named = parse_attack(text, rows.threat.norm)
    return ascend(rule, surrogates, rows.x, rows.goal, rows.threat, rows.rng, [*named, *techniques])


def attacked(surrogates, rows, *techniques, rule="mi-fgsm"):
    return run(rule, surrogates, rows, *techniques)


# The gradient of a transform is that of the loss of the transformed image.

TRANSFORMS = [DI(p=1.0, ratio=0.6), SI(copies=1), Admix(mixes=1, scales=1), SSA(copies=1), BlockShuffle(copies=1)]


@pytest.mark.parametrize("technique", TRANSFORMS, ids=lambda value: value.info.name)
def test_gradients_of_transforms_are_finite_differences(technique):
    surrogates, rows = problem(members=1)
    oracle = technique.wrap(SurrogateOracle(surrogates, "ce"))
    found = oracle.gradient(rows, rows.x)

    def loss(x):
        return rows.goal.loss(surrogates(oracle.transform(rows, x, 0)))

    direction, step = images(3) - 0.5, 1e-5
    difference = (loss(rows.x + step * direction) - loss(rows.x - step * direction)) / (2 * step)
    torch.testing.assert_close((found * direction).flatten(1).sum(1), difference, rtol=1e-6, atol=1e-9)
    assert found.abs().amax() > 0


def test_copies_are_averaged():
    surrogates, rows = problem()
    point = rows.x.clone().requires_grad_()
    loss = sum(rows.goal.loss(surrogates(point / 2**number)) for number in range(5)) / 5
    (expected,) = torch.autograd.grad(loss.sum(), point)
    torch.testing.assert_close(gradient(SI(), surrogates, rows), expected)


# DI.


def test_di_without_chance_is_the_identity():
    surrogates, rows = problem()
    assert torch.equal(attacked(surrogates, rows, DI(p=0.0)), attacked(surrogates, rows))
    assert torch.equal(attacked(surrogates, rows, DI(ratio=1.0)), attacked(surrogates, rows))


@pytest.mark.parametrize("size", [5, 7, 10])
@pytest.mark.parametrize("place", [0.0, 0.5, 0.999])
def test_di_resizes_as_torch_does_and_pads(size, place):
    x = images()[:1, :, :, :10]
    scale = torch.tensor([(size - 5 + 0.5) / 5]).double() if size < 10 else torch.zeros(1).double()
    matrix = placing(10, 0.5 if size < 10 else 1.0, scale, torch.tensor([place]).double())
    resized = F.interpolate(x, (8, size), mode="bilinear", align_corners=False)
    start = math.floor(place * (11 - size))
    torch.testing.assert_close(x @ matrix[0].T, F.pad(resized, (start, 10 - size - start)))


def test_di_transforms_a_share_p_of_rows_each_with_its_own_draws():
    x = images(0, (1, 1, 20, 20)).expand(400, -1, -1, -1)
    rows = Rows(x, UNUSED, LINF, RowRng(0, "di", torch.arange(400)), UNUSED)
    moved = DI(p=0.3)._transform(rows, x, 0)
    changed = (moved != x).flatten(1).any(1)
    assert 80 < changed.sum() < 160
    # 3 x 3 places of 18 pixels and 2 x 2 of 19.
    assert len(torch.unique(moved[changed].flatten(1), dim=0)) == 13
    inside = (moved[changed] != 0).flatten(1).sum(1)
    assert inside.min() >= 18**2
    assert inside.max() <= 19**2


# TI.


@pytest.mark.parametrize("width", [1, 3, 5, 15])
def test_tis_kernel_sums_to_one_and_is_symmetric(width):
    kernel = gaussian(width)
    assert kernel.sum().item() == pytest.approx(1)
    torch.testing.assert_close(kernel, kernel.flip(0))


def test_ti_of_one_pixel_is_the_identity():
    surrogates, rows = problem()
    assert torch.equal(attacked(surrogates, rows, TI(kernel=1)), attacked(surrogates, rows))


@pytest.mark.parametrize("width", [3, 5, 7, 21])
def test_ti_is_a_convolution_with_zeros_around(width):
    surrogates, rows = problem()
    kernel = gaussian(width)
    window = torch.outer(kernel, kernel).expand(3, 1, -1, -1)
    expected = F.conv2d(
        surrogates.gradient(rows.x, rows.goal, "ce", rows.rng), window, padding=width // 2, groups=3
    )
    torch.testing.assert_close(gradient(TI(kernel=width), surrogates, rows), expected)


def test_ti_commutes_with_shifts_inside():
    matrix = band(20, gaussian(5))
    x = torch.zeros(20, dtype=torch.float64)
    x[6:12] = images()[0, 0, 0, :6]
    torch.testing.assert_close(matrix @ x.roll(3), (matrix @ x).roll(3))


@pytest.mark.parametrize(("side", "width"), [(8, 3), (32, 3), (64, 3), (224, 11), (299, 15), (384, 19)])
def test_tis_kernel_grows_with_the_image(side, width):
    assert TI().width(side, side + 5) == width
    assert TI(kernel=7).width(side, side) == 7


# SI, Admix.


def test_si_of_one_copy_is_the_rule_itself():
    surrogates, rows = problem()
    assert torch.equal(attacked(surrogates, rows, SI(copies=1)), attacked(surrogates, rows))


def test_admix_without_others_is_si():
    surrogates, rows = problem()
    torch.testing.assert_close(
        gradient(Admix(mixes=2, share=0.0, scales=3), surrogates, rows), gradient(SI(copies=3), surrogates, rows)
    )


def test_admix_mixes_each_rows_own_draw_from_the_pool():
    surrogates, rows = problem()
    oracle: Any = Admix().wrap(SurrogateOracle(surrogates, "ce"))
    seen = [split_rng(rows, "admix", mix).rng.integers(len(surrogates.pool)) for mix in range(3) for _ in range(5)]
    for number, partner in enumerate(seen):
        expected = (rows.x + 0.2 * surrogates.pool[partner]) / 2 ** (number % 5)
        torch.testing.assert_close(oracle.transform(rows, rows.x, number), expected)
    assert len({tuple(partner.tolist()) for partner in seen}) == 3


def test_admix_wants_a_pool_of_the_same_size():
    surrogates, rows = problem()
    with pytest.raises(UsageError, match="give Surrogates a pool"):
        attacked(replace(surrogates, pool=None), rows, Admix())
    with pytest.raises(UsageError, match="images of one size"):
        attacked(replace(surrogates, pool=images(0, (4, 3, 8, 8))), rows, Admix())


# SSA.


@pytest.mark.parametrize("length", [1, 2, 7, 32])
def test_the_cosine_transform_is_scipys(length):
    matrix = cosines(length)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(length, dtype=torch.float64))
    signal = images(1, (1, 1, 1, length))[0, 0, 0]
    torch.testing.assert_close(matrix @ signal, torch.tensor(scipy.fft.dct(signal.numpy(), norm="ortho")))


def test_ssa_without_change_is_the_identity():
    surrogates, rows = problem()
    oracle: Any = SSA(rho=0.0, sigma=0.0).wrap(SurrogateOracle(surrogates, "ce"))
    torch.testing.assert_close(oracle.transform(rows, rows.x, 0), rows.x, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        gradient(SSA(copies=2, rho=0.0, sigma=0.0), surrogates, rows), gradient(SI(copies=1), surrogates, rows)
    )


@pytest.mark.parametrize(("threat", "size"), [("linf:0.1", 0.1), ("l2:2", 2 / math.sqrt(3000))])
def test_ssas_noise_and_scales_are_of_their_sizes(threat, size):
    x = torch.zeros(40, 3, 25, 40, dtype=torch.float64)
    rows = Rows(x, UNUSED, ThreatModel.parse(threat), RowRng(0, "s", torch.arange(40)), UNUSED)
    noise = SSA(rho=0.0, sigma=0.5)._transform(rows, x, 0)
    assert noise.std().item() == pytest.approx(0.5 * size, rel=0.02)
    flat = torch.zeros_like(x)
    flat[:, :, 3, 4] = 1
    spectrum = cosines(25).T @ flat @ cosines(40)
    scaled = cosines(25) @ SSA(sigma=0.0)._transform(rows, spectrum, 0) @ cosines(40).T
    factors = scaled[:, :, 3, 4].flatten()
    assert 0.5 <= factors.min() < 0.55
    assert 1.45 < factors.max() <= 1.5


# Block shuffle.


def test_block_shuffle_of_one_unturned_block_is_the_identity():
    surrogates, rows = problem()
    oracle: Any = BlockShuffle(blocks=1, degrees=0.0).wrap(SurrogateOracle(surrogates, "ce"))
    torch.testing.assert_close(oracle.transform(rows, rows.x, 0), rows.x)


@pytest.mark.parametrize("blocks", [2, 3])
def test_block_shuffle_without_turns_keeps_every_pixel(blocks):
    x = images(0, (30, 2, 11, 13))
    rows = Rows(x, UNUSED, LINF, RowRng(0, "b", torch.arange(30)), UNUSED)
    moved = BlockShuffle(blocks=blocks, degrees=0.0)._transform(rows, x, 0)
    torch.testing.assert_close(moved.flatten(2).sort(2).values, x.flatten(2).sort(2).values)
    assert (moved - x).abs().flatten(1).amax(1).gt(0.1).float().mean() > 0.5
    # Neighbours stay neighbours but at the cuts.
    right = (moved[:, :, :, 1:] - moved[:, :, :, :-1]).flatten(1)
    known = (x[:, :, :, 1:] - x[:, :, :, :-1]).flatten(1)
    kept = torch.stack(
        [torch.isclose(a[:, None], b[None, :]).any(1).float().mean() for a, b in zip(right, known, strict=True)]
    )
    assert kept.min() > 0.8


def test_block_shuffle_turns_a_block_as_scipy_does():
    x = images(0, (1, 1, 9, 9)).expand(20, -1, -1, -1)
    rows = Rows(x, UNUSED, LINF, RowRng(0, "b", torch.arange(20)), UNUSED)
    technique = BlockShuffle(blocks=1, degrees=24.0)
    moved = technique._transform(rows, x, 0)
    angles = 24 * (2 * split_rng(rows, "block-shuffle", 0).rng.uniform(5)[:, 4] - 1)
    for found, angle in zip(moved[:, 0], angles.tolist(), strict=True):
        best = min(
            np.abs(scipy.ndimage.rotate(x[0, 0].numpy(), sign * angle, reshape=False, order=1) - found.numpy())[
                2:-2, 2:-2
            ].max()
            for sign in (-1, 1)
        )
        assert best < 1e-6


# VMI, PGN, RAP.


@pytest.mark.parametrize("rule", ["mi-fgsm", "ni-fgsm", "pgd"])
def test_vmi_without_neighbourhood_is_the_rule_itself(rule):
    surrogates, rows = problem()
    assert torch.equal(
        attacked(surrogates, rows, VMI(copies=4, beta=0.0), rule=rule), attacked(surrogates, rows, rule=rule)
    )


def test_vmi_is_the_papers_recursion():
    surrogates, rows = problem()
    technique, rule = VMI(copies=3), make("mi-fgsm", steps=4, step_size="0.1eps")
    found = ascend(rule, surrogates, rows.x, rows.goal, LINF, rows.rng, [technique])
    x, momentum, variance = rows.x, torch.zeros_like(rows.x), torch.zeros_like(rows.x)
    for step in range(4):
        here = replace(rows, rng=rows.rng.at(step=step + 1))

        def slope(point):
            return surrogates.gradient(point, rows.goal, "ce", rows.rng)

        total = slope(x) + variance
        momentum = momentum + total / total.abs().sum((1, 2, 3), keepdim=True)
        near = [
            x + 0.15 * (2 * split_rng(here, "vmi", number).rng.uniform(*SHAPE[1:]).double() - 1)
            for number in (1, 2, 3)
        ]
        variance = sum(map(slope, near)) / 3 - slope(x)
        x = LINF.project(x + 0.01 * momentum.sign(), rows.x)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-12)


def test_pgn_is_the_mean_of_both_gradients():
    surrogates, rows = problem()
    found = gradient(PGN(copies=2, balance=0.3), surrogates, rows)
    total = 0
    for number in range(2):
        draws = split_rng(rows, "pgn", 2 * number).rng.uniform(*SHAPE[1:]).double()
        near = rows.x + 0.3 * (2 * draws - 1)
        first = surrogates.gradient(near, rows.goal, "ce", rows.rng)
        below = near - 0.01 * first / first.abs().mean((1, 2, 3), keepdim=True)
        total = total + 0.7 * first + 0.3 * surrogates.gradient(below, rows.goal, "ce", rows.rng)
    torch.testing.assert_close(found, total / 2)
    still = gradient(PGN(copies=2, radius=0.0, balance=0.0), surrogates, rows)
    torch.testing.assert_close(still, surrogates.gradient(rows.x, rows.goal, "ce", rows.rng))


@pytest.mark.parametrize("threat", ["linf:0.1", "l2:1", "l1:10"])
def test_rap_queries_a_near_point_of_lower_loss(threat):
    surrogates, rows = problem(ThreatModel.parse(threat))
    seen = []

    class Watched(SurrogateOracle):
        def gradient(self, rows, x, members=None, weights=None):
            seen.append(x)
            return super().gradient(rows, x, members, weights)

    RAP(radius=0.5, late=0.0).wrap(Watched(surrogates, "ce", steps=10)).gradient(rows, rows.x)
    losses = [rows.goal.loss(surrogates(x)) for x in seen]
    assert len(seen) == 9
    assert (losses[-1] < losses[0]).all()
    assert (losses[-1] < rows.goal.loss(surrogates(rows.x))).all()
    for x in seen:
        assert (rows.threat.distance(x, rows.x) <= 0.5 * float(rows.threat.eps) + 1e-12).all()
        assert x.min() >= 0
        assert x.max() <= 1


def test_rap_starts_late():
    surrogates, rows = problem()
    late, never = RAP(steps=2, late=0.6), RAP(steps=2, late=1.0)
    rule = make("i-fgsm", steps=5)
    whole = [
        ascend(rule, surrogates, rows.x, rows.goal, LINF, rows.rng, techniques)
        for techniques in ([], [never], [late], [RAP(steps=2, late=0.0)])
    ]
    assert torch.equal(whole[0], whole[1])
    assert len({tuple(x.flatten().tolist()) for x in whole}) == 3


def test_ni_without_momentum_is_i():
    surrogates, rows = problem()
    assert torch.equal(run("ni-fgsm(momentum=0)", surrogates, rows), run("i-fgsm", surrogates, rows))


# Ensembles.


def test_svre_without_inner_steps_is_the_ensemble():
    surrogates, rows = problem(members=3)
    plain = attacked(surrogates, rows)
    # Steps of almost no length leave the ensemble's gradient at every one.
    torch.testing.assert_close(attacked(surrogates, rows, SVRE(step_size=StepSize(1e-12))), plain)


def test_svre_with_one_member_is_an_inner_run_of_the_rule():
    surrogates, rows = problem(members=1)
    found = gradient(SVRE(rounds=3), surrogates, rows)
    x, velocity = rows.x, torch.zeros_like(rows.x)
    for _ in range(3):
        slope = surrogates.gradient(x, rows.goal, "ce", rows.rng)
        velocity = velocity + slope / slope.abs().mean((1, 2, 3), keepdim=True)
        x = LINF.project(x + 0.01 * velocity.sign(), rows.x)
    torch.testing.assert_close(found, velocity)


@pytest.mark.parametrize("combine", ["logits", "loss"])
def test_adaea_without_weighing_and_filter_is_the_ensemble(combine):
    surrogates, rows = problem(members=3)
    surrogates = replace(surrogates, combine=combine)
    found = gradient(AdaEA(beta=0.0, threshold=-1.0), surrogates, rows)
    torch.testing.assert_close(found, surrogates.gradient(rows.x, rows.goal, "ce", rows.rng))
    alone = surrogates.select([1])
    assert torch.equal(gradient(AdaEA(), alone, rows), alone.gradient(rows.x, rows.goal, "ce", rows.rng))


@pytest.mark.parametrize("targeted", [False, True])
def test_adaea_prefers_the_member_whose_steps_transfer(targeted):
    surrogates, rows = problem(members=2)
    blind = Surrogates([lambda x: surrogates.members[0](x), lambda x: surrogates.members[0](1 - x) * 1e-3])
    goal = Goal(rows.goal.labels, (rows.goal.labels + 1) % 4) if targeted else rows.goal
    rows = replace(rows, goal=goal, aim=goal)
    technique = AdaEA(step_size=StepSize(1.0))
    oracle: Any = technique.wrap(SurrogateOracle(blind, "ce"))
    own = [blind.gradient(rows.x, goal, "ce", rows.rng, [member]) for member in (0, 1)]
    weights = oracle._weights(rows, rows.x, own)
    torch.testing.assert_close(weights.sum(0), torch.ones(5, dtype=torch.float64))
    moved = [LINF.project(rows.x + 0.1 * slope.sign(), rows.x) for slope in own]
    caused = [[goal.loss(logits).abs() + 1e-6 for logits in blind.logits(x)] for x in moved]
    ratios = torch.stack([caused[0][1] / caused[1][1], caused[1][0] / caused[0][0]])
    # The other way round towards targets, where a small loss is a good one.
    ratios = (1 / ratios if targeted else ratios).clamp(max=10)
    torch.testing.assert_close(weights, (10 * ratios).softmax(0))
    assert (weights[0] - weights[1]).abs().max() > 0.1


@pytest.mark.parametrize("combine", ["logits", "gradients", "consensus"])
def test_triage_without_stakes_and_with_hope_is_the_ensemble(combine):
    surrogates, rows = problem(members=3)
    surrogates = replace(surrogates, combine=combine, weights=(1, 2, 3))
    found = gradient(Triage(stake=1.0, hope=-1e9), surrogates, rows)
    torch.testing.assert_close(found, surrogates.gradient(rows.x, rows.goal, "ce", rows.rng))
    alone = surrogates.select([1])
    assert torch.equal(gradient(Triage(), alone, rows), alone.gradient(rows.x, rows.goal, "ce", rows.rng))


def fixed(*logits):
    """Return members that say the same of every image."""

    def constant(own: list[float]) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: torch.tensor(own).double().expand(len(x), -1)

    return Surrogates([constant(own) for own in logits])


@pytest.mark.parametrize("targeted", [False, True])
def test_triage_weighs_by_margins_in_spreads_of_logits(targeted):
    # Of four classes, 2 and -2 twice each have a spread of 2: margins of 2, 0 and -2 spreads, whatever their size.
    members = ([-2.0, 2, 2, -2], [20.0, 20, -20, -20], [0.2, -0.2, 0.2, -0.2])
    surrogates, rows = fixed(*members), problem()[1]
    labels = torch.tensor([0, 0, 2, 1, 3])
    goal = Goal(labels, (labels + 1) % 4) if targeted else Goal(labels)
    rows = replace(rows, goal=goal, aim=goal)
    logits = surrogates.logits(rows.x)
    for step, late in ((1, False), (10, True)):
        oracle: Any = Triage(stake=3.0).wrap(SurrogateOracle(surrogates, "ce", steps=10))
        found = oracle._weights(replace(rows, rng=rows.rng.at(step=step)), logits)
        for row, label in enumerate(labels.tolist()):
            worth = []
            for own in members:
                others = [own[(label + 1) % 4]] if targeted else [*own[:label], *own[label + 1 :]]
                margin = (max(others) - own[label]) / max(own)
                worth.append((1 if margin >= 1 else 3) * (not late or margin > -0.25))
            # The first two are nobody's -2 in any row, so somebody is left.
            weights = torch.tensor(worth if any(worth) else [3.0] * 3).double()
            torch.testing.assert_close(found[:, row], weights / weights.sum())


def test_triage_drops_members_permanently_but_never_all():
    surrogates, rows = problem(members=2)
    oracle: Any = Triage(stake=1.0).wrap(SurrogateOracle(surrogates, "ce", steps=4))
    labels = rows.goal.labels
    lost, won = (sign * F.one_hot(labels, 4).double() for sign in (1, -1))
    late = replace(rows, rng=rows.rng.at(step=3))
    assert torch.equal(
        oracle._weights(late, torch.stack([lost, won])), torch.tensor([[0.0], [1]]).double().expand(2, 5)
    )
    # the one that was given up may be won by now: it stays out; where both are, both count again
    assert torch.equal(
        oracle._weights(late, torch.stack([won, won])), torch.tensor([[0.0], [1]]).double().expand(2, 5)
    )
    assert torch.equal(oracle._weights(late, torch.stack([won, lost])), torch.full((2, 5), 0.5).double())


def test_agreement_is_the_mean_cosine_of_all_pairs():
    gradients = torch.stack([images(seed) - 0.5 for seed in range(3)])
    pairs = [F.cosine_similarity(gradients[i], gradients[j], dim=1) for i, j in ((0, 1), (0, 2), (1, 2))]
    torch.testing.assert_close(agreement(gradients), torch.stack(pairs).mean(0))


def test_smer_of_one_member_and_round_is_the_rule_itself():
    surrogates, rows = problem(members=1)
    found = attacked(surrogates, rows, SMER(rounds=1, rate=0.0))
    torch.testing.assert_close(found, attacked(surrogates, rows))


def test_smer_queries_every_member_once_a_round():
    surrogates, rows = problem(members=3)
    queried = []

    class Watched(SurrogateOracle):
        def gradient(self, rows, x, members=None, weights=None):
            queried.append(members[0])
            return super().gradient(rows, x, members, weights)

    SMER(rounds=4).wrap(Watched(surrogates, "ce")).gradient(rows, rows.x)
    rounds = [queried[start : start + 3] for start in range(0, 12, 3)]
    assert len(queried) == 12
    assert all(sorted(order) == [0, 1, 2] for order in rounds)
    assert len({tuple(order) for order in rounds}) > 1


@pytest.mark.parametrize("targeted", [False, True])
def test_smers_weights_move_to_raise_the_ensembles_loss(targeted):
    surrogates, rows = problem(members=3)
    goal = Goal(rows.goal.labels, (rows.goal.labels + 1) % 4) if targeted else rows.goal
    rows = replace(rows, goal=goal, aim=goal)
    oracle: Any = SMER(decay=0.0, rate=1e-3).wrap(SurrogateOracle(surrogates, "ce"))
    before = torch.ones(3, 5, dtype=torch.float64)
    after = oracle._reweighed(rows, rows.x, before)
    logits = surrogates.logits(rows.x)
    losses = [goal.loss((weight[:, :, None] * logits).mean(0)) for weight in (before, after)]
    assert (losses[1] > losses[0]).all()


# Ghosts, strings, costs.


def test_ghost_and_sgm_refuse_nets_without_residual_blocks():
    surrogates, rows = problem()
    for name in ("ghost", "sgm"):
        with pytest.raises(UsageError, match="no residual block is known in 'Net'") as error:
            attacked(surrogates, rows, make_technique(name))
        assert str(error.value).endswith(".")


def test_ghost_has_a_range():
    with pytest.raises(UsageError, match="erosion=2"):
        Ghost(erosion=2.0)


@pytest.mark.parametrize(
    ("text", "gradients"),
    [
        ("mi-fgsm", 10),
        ("mi-fgsm+vmi+ssa", 10 * 21 * 20),
        ("vmi-fgsm+di", 210),
        ("i-fgsm(steps=4)+pgn(copies=3)", 24),
        ("mi-fgsm+svre", 60),
        ("mi-fgsm+admix", 150),
        ("fgsm+rap", 9),
        ("si-ni-fgsm", 50),
    ],
)
def test_costs(text, gradients):
    assert compose(parse_attack(text, "linf")).gradients == gradients


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mi-fgsm+dj", "Did you mean 'di'"),
        ("mi-fgsm+di(p=2)", "di: p=2 must be from 0 to 1"),
        ("mi-fgsm+di(ratio=0)", "di: ratio=0 must be above 0 and at most 1"),
        ("mi-fgsm+ti(kernel=4)", "must be odd"),
        ("mi-fgsm+vmi(copies=0)", "must be at least 1"),
        ("mi-fgsm+triage(stake=0)", "stake=0 must be above 0"),
        ("mi-fgsm+triage(after=2)", "after=2 must be from 0 to 1"),
        ("mi-fgsm+svre(rounds=0)", "must be at least 1"),
        ("square+di", "takes no techniques"),
    ],
)
def test_invalid_options_are_one_sentence(text, message):
    with pytest.raises(UsageError, match=message) as error:
        compose(parse_attack(text, "linf"))
    assert "\n" not in str(error.value)
    assert str(error.value)[-1] in ".?"


def test_the_leftmost_technique_is_outermost():
    surrogates, rows = problem()
    texts = ("mi-fgsm+vmi(copies=2)+si(copies=2)", "mi-fgsm+si(copies=2)+vmi(copies=2)")
    assert not torch.equal(*(run(text, surrogates, rows) for text in texts))
