"""Aggregators: the worked example of CrossMax, its properties, and what all aggregators share."""

from __future__ import annotations

import math

import pytest
import torch

from robustkit.core.errors import UsageError
from robustkit.models.ensembles.aggregation import AGGREGATORS, crossmax, parse_aggregator

Z = torch.tensor([[[2.0, 1, 0], [0, 3, 1], [4, 0, 2]]])


def stacks(n=8, k=10, rows=64, seed=0):
    return torch.randn(rows, n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_worked_example() -> None:
    """B.4.1, and that the order of the two steps matters."""
    assert crossmax(Z, 2).tolist() == [[0, -1, 0]]
    assert crossmax(Z, 3).tolist() == [[-3, -4, 0]]
    assert crossmax(Z).tolist() == [[0, -1, 0]]
    swapped = Z - Z.amax(1, keepdim=True)
    swapped = swapped - swapped.amax(2, keepdim=True)
    assert swapped.sort(1, descending=True).values[:, 1].tolist() == [[0, 0, 0]]


def test_a_class_that_no_member_ranks_first_can_win() -> None:
    """B-P20."""
    z = torch.tensor([[[2.0, 1, 0], [0, 3, 3 - 2.01], [4, 0, 4 - 2.02]]])
    assert crossmax(z, 3).argmax(1).item() == 2
    assert not (z.argmax(2) == 2).any()


@pytest.mark.parametrize("k", [None, 2, 3, 8])
def test_crossmax_is_invariant_to_shifts_scale_and_order_of_members(k) -> None:
    """B-P1 to B-P6: shifts of a predictor, scale, permutations; never above 0; not shifts of a class."""
    z = stacks()
    y = crossmax(z, k)
    shift = stacks(8, 1, seed=1)
    torch.testing.assert_close(crossmax(z + shift, k), y)
    torch.testing.assert_close(crossmax(3.5 * z, k), 3.5 * y)
    assert torch.equal(crossmax(z[:, torch.randperm(8)], k), y)
    order = torch.randperm(10)
    assert torch.equal(crossmax(z[:, :, order], k), y[:, order])
    assert (y <= 0).all()
    assert not torch.allclose(crossmax(z + stacks(1, 10, seed=2), k), y)
    if k and k > 2:
        assert (y <= crossmax(z, k - 1)).all()


def test_a_class_with_k_first_ranks_has_score_0_and_no_gradient() -> None:
    """B-P6: a class with k first places has score 0 and no gradient; others depend on at most four logits."""
    z = stacks().requires_grad_()
    y = crossmax(z, 3)
    votes = torch.nn.functional.one_hot(z.argmax(2), 10).sum(1)
    assert (votes >= 3).any()
    assert (y[votes >= 3] == 0).all()
    for row, cls in ((votes >= 3).nonzero()[:5]).tolist():
        (slope,) = torch.autograd.grad(y[row, cls], z, retain_graph=True)
        assert not slope.any()
    for row, cls in ((votes == 0).nonzero()[:20]).tolist():
        (slope,) = torch.autograd.grad(y[row, cls], z, retain_graph=True)
        assert 0 < (slope != 0).sum() <= 4
        torch.testing.assert_close(slope.sum(2), torch.zeros_like(slope.sum(2)))


def test_a_few_hijacked_predictors_tie_and_a_mean_falls_to_one() -> None:
    """B-P8: N = 8, k = 3, three predictors with unlimited logits."""
    z = 0.1 * stacks(rows=1)
    z[:, :, 4] = 5.0
    z[:, :3, 7] = 1e6
    y = crossmax(z, 3)
    assert y[0, 4] == 0
    assert y[0, 7] == 0
    one = z.clone()
    one[:, 1:3, 7] = -1
    assert AGGREGATORS["logits"](one).argmax(1).item() == 7
    assert crossmax(one, 3).argmax(1).item() == 4


def test_the_median_of_an_even_number_is_the_lower_middle_one() -> None:
    """B-P10."""
    z = stacks(8)
    torch.testing.assert_close(AGGREGATORS["median"](z), z.sort(1).values[:, 3])
    assert torch.equal(crossmax(z), crossmax(z, 5))


@pytest.mark.parametrize("k", [2, 3, 5, 8])
def test_a_class_that_all_members_rank_first_wins(k) -> None:
    """B-P7, where no other class has k gaps equal to its best."""
    z = stacks(rows=4000)
    z[:, :, 6] = z.amax(2) + stacks(8, 1, rows=4000, seed=3)[:, :, 0].abs() + 1e-6
    y = crossmax(z, k)
    assert (y.argmax(1) == 6).all()
    assert (y[:, 6] == 0).all()


@pytest.mark.parametrize("name", [*AGGREGATORS, "crossmax:3"])
def test_rows_are_independent_and_members_exchangeable(name) -> None:
    """B-P11 and A-P14 for all."""
    aggregate, z = parse_aggregator(name), stacks()
    whole = aggregate(z)
    assert whole.shape == (64, 10)
    assert torch.equal(aggregate(z[5:9]), whole[5:9])
    torch.testing.assert_close(aggregate(z.flip(1)), whole)


def test_the_mean_of_probabilities_is_finite_for_any_logits() -> None:
    """The oracle of A.11, a sum of 1, and gradients where a clamp would have none."""
    z = torch.tensor([[[0.0, 0], [math.log(3), 0]]], dtype=torch.float64)
    torch.testing.assert_close(
        AGGREGATORS["probabilities"](z),
        torch.tensor([[-0.470004, -0.980829]], dtype=torch.float64),
        atol=1e-6,
        rtol=0,
    )
    sure = torch.tensor([[[0.0, 800.0], [0.0, 900.0]]], requires_grad=True)
    out = AGGREGATORS["probabilities"](sure)
    assert out.isfinite().all()
    (slope,) = torch.autograd.grad(out[0, 0], sure)
    assert slope.abs().sum() > 0.5


def test_a_vote_counts_and_breaks_ties_by_probability() -> None:
    """Two against one wins whatever the one is sure of; one against one goes to the surer."""
    z = torch.tensor([[[1.0, 0, 0], [1, 0, 0], [0, 99, 0]], [[3.0, 0, 0], [0, 2, 0], [0, 0, 2.5]]])
    y = AGGREGATORS["vote"](z)
    assert y.argmax(1).tolist() == [0, 0]
    assert y.floor()[0].tolist() == [2, 1, 0]


def test_bad_names_and_degenerate_cases_are_refused() -> None:
    """One sentence each; B-P5."""
    for text in ("crossmx", "logits:2", "crossmax:1", "crossmax:x"):
        with pytest.raises(UsageError, match="combine"):
            parse_aggregator(text)
    with pytest.raises(UsageError, match="at least 2 predictors"):
        crossmax(Z[:, :1])
    with pytest.raises(UsageError, match="from 2 to"):
        crossmax(Z, 1)
