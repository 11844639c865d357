"""Surrogates: each way to combine them against the formula written out, in memory, streamed or batched."""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from robustkit.attack_api import Surrogates, mean_normalised
from robustkit.attack_api.surrogates import COMBINATIONS, SHARED
from robustkit.core.criteria import Goal
from robustkit.core.errors import UsageError
from robustkit.core.rng import RowRng
from robustkit.models.classifier import Classifier

SIZE, CLASSES, ROWS = 12, 4, 5
LABELS = torch.arange(ROWS) % CLASSES
GOALS = {"untargeted": Goal(LABELS), "targeted": Goal(LABELS, (LABELS + 1) % CLASSES)}
RNG = RowRng(0, "surrogates", torch.arange(ROWS))

combinations = pytest.mark.parametrize("combine", COMBINATIONS)


class Net:
    """Tanh of a linear map, mapped again; no matrix product, whose rounding depends on the batch size."""

    def __init__(self, seed, size=1.0):
        draw = torch.Generator().manual_seed(seed)
        self.inner = torch.randn(6, SIZE, generator=draw, dtype=torch.float64)
        self.outer = size * torch.randn(CLASSES, 6, generator=draw, dtype=torch.float64)

    def __call__(self, x):
        hidden = (x.flatten(1)[:, None] * self.inner).sum(2).tanh()
        return (hidden[:, None] * self.outer).sum(2)


# Logits of very different sizes, as of nets trained normally and adversarially.
NETS = [Net(0, 3.0), Net(1, 0.3), Net(2)]


def images(rows=ROWS, seed=7):
    return torch.rand(rows, 2, 2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(surrogates, x, goal=GOALS["untargeted"], **words):
    return surrogates.gradient(x, goal, words.pop("loss", "ce"), words.pop("rng", RNG), **words)


def written_out(combine, weights, x, goal, loss, nets=NETS):
    """Return the gradient by autograd through the whole formula."""
    point = x.clone().requires_grad_()
    shares = torch.tensor(weights).double() / sum(weights)
    if combine == "gradients":
        total = 0
        for share, net in zip(shares, nets, strict=True):
            (part,) = torch.autograd.grad(goal.loss(net(point), loss).sum(), point)
            total = total + share * part / part.abs().mean((1, 2, 3), keepdim=True)
        return total
    logits = [net(point) for net in nets]
    if combine == "consensus":
        # one slope for all, from the mean of logits of one spread; each member's part brought to one size
        slope = torch.autograd.grad(goal.loss(agreed(logits, shares), loss).sum(), logits, retain_graph=True)
        total = 0
        for share, own, towards in zip(shares, logits, slope, strict=True):
            (part,) = torch.autograd.grad(own, point, towards, retain_graph=True)
            total = total + share * part / part.abs().mean((1, 2, 3), keepdim=True)
        return total
    if combine == "logits":
        value = goal.loss((shares[:, None, None] * torch.stack(logits)).sum(0), loss)
    elif combine == "probabilities":
        value = goal.loss((shares[:, None, None] * torch.stack(logits).softmax(2)).sum(0).log(), loss)
    else:
        value = sum(share * goal.loss(one, loss) for share, one in zip(shares, logits, strict=True))
    return torch.autograd.grad(value.sum(), point)[0]


def agreed(logits, shares):
    """Return the mean of logits, each of the spread that they have on average."""
    spreads = [one.detach().sub(one.detach().mean(1, keepdim=True)).square().mean(1).sqrt() for one in logits]
    weighted = sum(share * spread for share, spread in zip(shares, spreads, strict=True))
    return sum(
        share * (weighted / spread)[:, None] * one
        for share, spread, one in zip(shares, spreads, logits, strict=True)
    )


def close(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def all_at_once(nets):
    inner, outer = (torch.stack([getattr(net, name) for net in nets]) for name in ("inner", "outer"))

    def together(x):
        hidden = (x.flatten(2)[:, :, None] * inner[:, None]).sum(3).tanh()
        return (hidden[:, :, None] * outer[:, None]).sum(3)

    return together


# The formulas.


@combinations
@pytest.mark.parametrize("weights", [None, (1, 2, 5)])
@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_a_gradient_is_that_of_the_formula(combine, weights, goal, loss):
    x = images()
    expected = written_out(combine, weights or (1, 1, 1), x, GOALS[goal], loss)
    for words in ({}, {"hold": False}, {"together": all_at_once(NETS)}):
        surrogates = Surrogates(NETS, combine, weights, **words)
        close(gradient(surrogates, x, GOALS[goal], loss=loss), expected)


def test_the_loss_of_means_and_the_mean_of_losses_are_not_the_same():
    found = [gradient(Surrogates(NETS, combine), images()) for combine in COMBINATIONS]
    for one, other in itertools.combinations(found, 2):
        assert (one - other).abs().max() > 1e-3


def test_a_mean_of_losses_has_the_mean_of_gradients():
    x = images()
    parts = [gradient(Surrogates([net]), x) for net in NETS]
    close(gradient(Surrogates(NETS, "loss"), x), sum(parts) / 3)


@combinations
def test_a_member_of_another_input_size_returns_gradients_of_the_images_size(combine):
    """Section F: the net behind `?size=` sees other images, and the gradient goes back through the resizing."""

    class Taller(torch.nn.Module):
        def forward(self, x):
            return Net(5)(x[..., :2, :] + x[..., 2:, :])

    resized = Classifier(Taller(), string="", identity={}, size=(4, 3))

    def by_hand(x):
        return Taller()(F.interpolate(x, (4, 3), mode="bilinear", align_corners=False, antialias=True))

    x = images()
    found = gradient(Surrogates([NETS[0], resized], combine), x)
    assert found.shape == x.shape
    close(found, written_out(combine, (1, 1), x, GOALS["untargeted"], "ce", [NETS[0], by_hand]))


@combinations
def test_held_and_streamed_are_the_same_to_the_bit(combine):
    x = images()
    held, streamed = (gradient(Surrogates(NETS, combine, hold=hold), x) for hold in (True, False))
    assert torch.equal(held, streamed)


@combinations
@given(st.permutations(range(3)), st.tuples(*[st.floats(0.1, 10)] * 3))
@settings(max_examples=15)
def test_the_order_of_the_list_does_not_matter(combine, order, weights):
    x = images()
    listed = Surrogates(NETS, combine, weights)
    moved = Surrogates([NETS[i] for i in order], combine, [weights[i] for i in order])
    close(gradient(listed, x), gradient(moved, x))
    close(listed(x), moved(x))


@combinations
@pytest.mark.parametrize("count", [2, 5])
def test_the_same_member_many_times_is_that_member(combine, count):
    x = images()
    one, many = Surrogates(NETS[:1], combine), Surrogates(NETS[:1] * count, combine)
    close(gradient(one, x), gradient(many, x))
    close(one(x).log_softmax(1), many(x).log_softmax(1))
    # Said by weights instead of by repetition.
    repeated = Surrogates([NETS[0], *NETS[1:2] * count], combine)
    weighted = Surrogates(NETS[:2], combine, (1, count))
    close(gradient(repeated, x), gradient(weighted, x))


@combinations
def test_the_size_of_weights_does_not_matter(combine):
    x = images()
    close(*(gradient(Surrogates(NETS, combine, weights), x) for weights in ((1, 2, 3), (0.1, 0.2, 0.3))))
    close(*(gradient(Surrogates(NETS, combine, weights), x) for weights in (None, (7, 7, 7))))


@combinations
def test_the_gradient_of_a_row_is_independent_of_the_batch(combine):
    x, goal = images(), GOALS["targeted"]
    for hold in (True, False):
        surrogates = Surrogates(NETS, combine, hold=hold)
        whole = gradient(surrogates, x, goal)
        for order in ([4, 2, 0, 3, 1], [3], [1, 2]):
            index = torch.tensor(order)
            part = gradient(surrogates, x[index], goal.select(index), rng=RNG.select(index))
            assert torch.equal(part, whole[index])


# Some of the members, and weights of the moment.


@combinations
@pytest.mark.parametrize("hold", [True, False])
def test_a_subset_of_members_is_an_ensemble(combine, hold):
    x = images()
    surrogates = Surrogates(NETS, combine, (1, 2, 5), hold)
    for members in ([0], [2], [0, 2], [2, 1]):
        expected = written_out(
            combine, [(1, 2, 5)[i] for i in members], x, GOALS["untargeted"], "ce", [NETS[i] for i in members]
        )
        close(gradient(surrogates, x, members=members), expected)
        close(gradient(surrogates.select(members), x), expected)


@combinations
@pytest.mark.parametrize("together", [False, True])
def test_members_in_another_order_keep_their_weights(combine, together):
    x, weights = images(), torch.tensor([5.0, 1.0, 2.0]).double()
    surrogates = Surrogates(NETS, combine, together=all_at_once(NETS) if together else None)
    moved = gradient(surrogates, x, members=[2, 0, 1], weights=weights)
    close(moved, gradient(surrogates, x, members=[0, 1, 2], weights=weights[[1, 2, 0]]))
    twice = gradient(surrogates, x, members=[1, 1, 1])
    close(twice, gradient(surrogates, x, members=[1]))


@combinations
def test_weights_per_row_are_used_unchanged(combine):
    x = images()
    weights = 0.1 + torch.rand(3, ROWS, generator=torch.Generator().manual_seed(3)).double()
    found = gradient(Surrogates(NETS, combine), x, weights=weights)
    for row in range(ROWS):
        index = torch.tensor([row])
        goal, rng = GOALS["untargeted"].select(index), RNG.select(index)
        close(found[index], gradient(Surrogates(NETS, combine), x[index], goal, rng=rng, weights=weights[:, row]))
    if combine in ("loss", "gradients"):
        close(gradient(Surrogates(NETS, combine), x, weights=2 * weights), 2 * found)
    close(
        gradient(Surrogates(NETS, combine, (1, 2, 5)), x),
        gradient(Surrogates(NETS, combine), x, weights=torch.tensor([1.0, 2.0, 5.0]).double() / 8),
    )


def test_weights_of_1_make_a_sum_of_logits():
    x, goal = images(), GOALS["untargeted"]
    point = x.clone().requires_grad_()
    loss = goal.loss(sum(net(point) for net in NETS)).sum()
    close(gradient(Surrogates(NETS), x, weights=torch.ones(3)), torch.autograd.grad(loss, point)[0])


def test_a_weight_per_row_may_be_zero():
    x = images()
    for combine in COMBINATIONS:
        found = gradient(Surrogates(NETS, combine), x, weights=torch.tensor([0.0, 1.0, 0.0]))
        close(found, gradient(Surrogates(NETS[1:2], combine), x))


@combinations
@pytest.mark.parametrize("words", [{}, {"hold": False}, {"together": all_at_once(NETS)}])
def test_weights_may_be_computed_from_the_logits(combine, words):
    x, seen = images(), []

    def weigh(logits):
        seen.append(logits)
        return logits.softmax(2)[:, :, 0] + 0.1

    found = gradient(Surrogates(NETS, combine, **words), x, weights=weigh)
    logits = torch.stack([net(x) for net in NETS])
    close(seen[0], logits)
    close(found, gradient(Surrogates(NETS, combine), x, weights=logits.softmax(2)[:, :, 0] + 0.1))


# As a model.


@combinations
def test_surrogates_are_called_as_one_model(combine):
    x = images()
    logits = torch.stack([net(x) for net in NETS])
    shares = torch.tensor([1.0, 2.0, 5.0]).double()[:, None, None] / 8
    found = Surrogates(NETS, combine, (1, 2, 5))(x)
    if combine == "probabilities":
        close(found, (shares * logits.softmax(2)).sum(0).log())
        close(found.softmax(1).sum(1), torch.ones(ROWS).double())
    elif combine == "consensus":
        close(found, agreed(logits, shares[:, 0, 0]))
    else:
        close(found, (shares * logits).sum(0))


def test_logits_of_each_member():
    x = images().requires_grad_()
    surrogates = Surrogates(NETS, weights=(1, 2, 5))
    found = surrogates.logits(x)
    assert not found.requires_grad
    close(found, torch.stack([net(x) for net in NETS]).detach())
    assert torch.equal(surrogates.logits(x, [2, 0]), found[[2, 0]])


def test_a_model_is_the_only_member_and_surrogates_are_themselves():
    surrogates = Surrogates(NETS)
    assert Surrogates.of(surrogates) is surrogates
    one = Surrogates.of(NETS[0])
    assert len(one) == 1
    close(one(images()), NETS[0](images()))


# Numbers at the edge.


@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probabilities_are_finite_at_any_logits(size, dtype):
    """The mean of the probabilities would be 0 in float, its logarithm infinite."""
    weight = torch.randn(CLASSES, SIZE, generator=torch.Generator().manual_seed(4)).to(dtype)
    nets = [lambda x, sign=sign: sign * size * (x.flatten(1)[:, None] * weight).sum(2) for sign in (1, 0.5)]
    x = images().to(dtype)
    for hold in (True, False):
        surrogates = Surrogates(nets, "probabilities", hold=hold)
        assert surrogates(x).isfinite().all()
        assert gradient(surrogates, x).isfinite().all()
    assert gradient(surrogates, x).flatten(1).abs().sum(1).gt(0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-43, 1e-38, 1e-30, 1e-3, 1.0, 1e30, 3e38])
def test_normalised_rows_have_mean_size_1(size, dtype):
    rows = images(4).to(dtype) - 0.5
    rows[1] *= size
    rows[2] = 0
    found = mean_normalised(rows)
    assert found.isfinite().all()
    close(found.abs().mean((1, 2, 3)), torch.tensor([1, 1, 0, 1]).to(dtype), 1e-6)
    assert torch.equal(found[1].sign(), rows[1].sign())
    assert torch.equal(found[0], mean_normalised(rows[:1])[0])


def test_a_member_with_tiny_gradients_has_the_same_weight():
    x = images()
    nets: list[Any] = [NETS[0], lambda x: 1e-30 * NETS[1](x)]
    found = gradient(Surrogates(nets, "gradients"), x, loss="margin")
    close(found, gradient(Surrogates(NETS[:2], "gradients"), x, loss="margin"))


@combinations
@pytest.mark.parametrize("hold", [True, False])
def test_members_without_a_gradient_give_zero(combine, hold):
    x = images()
    nets: list[Any] = [
        NETS[0],
        lambda x: NETS[1](x).detach(),
        lambda x: NETS[2](x) * 0,
    ]
    found = gradient(Surrogates(nets, combine, hold=hold), x)
    assert found.isfinite().all()
    assert found.abs().sum() > 0
    none = gradient(Surrogates([lambda x: NETS[1](x).detach()], combine, hold=hold), x)
    assert torch.equal(none, torch.zeros_like(x))


# What is left as it was, what it costs, where members are.


class Counted:
    """Counts images forwards and backwards, and the graphs that are alive at once."""

    def __init__(self, net, log):
        self.net, self.log = net, log

    def __call__(self, x):
        logits = self.net(x)
        self.log.append("forward" if logits.requires_grad else "look")
        if logits.requires_grad:
            logits.register_hook(lambda grad: self.log.append("backward"))
        return logits


@pytest.mark.parametrize(
    ("combine", "hold", "expected"),
    [
        *((combine, True, ["forward"] * 3 + ["backward"] * 3) for combine in COMBINATIONS),
        *((combine, False, ["look"] * 3 + ["forward", "backward"] * 3) for combine in SHARED),
        *((combine, False, ["forward", "backward"] * 3) for combine in ("loss", "gradients")),
    ],
)
def test_passes_of_a_gradient_and_their_order(combine, hold, expected):
    log: list[str] = []
    surrogates = Surrogates([Counted(net, log) for net in NETS], combine, hold=hold)
    gradient(surrogates, images())
    assert log == expected
    log.clear()
    gradient(surrogates, images(), members=[1])
    assert log == ["forward", "backward"]
    log.clear()
    surrogates.logits(images())
    assert log == ["look"] * 3


def test_gradients_are_computed_under_no_grad_and_no_state_is_changed():
    x = images()
    kept = x.clone()
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(SIZE, CLASSES)).double()
    for combine, hold in itertools.product(COMBINATIONS, (True, False)):
        surrogates = Surrogates([net, *NETS], combine, hold=hold)
        with torch.no_grad():
            without = gradient(surrogates, x)
            assert not torch.is_grad_enabled()
        found = gradient(surrogates, x.clone().requires_grad_())
        assert torch.equal(without, found)
        assert not found.requires_grad
    assert torch.equal(x, kept)
    assert not x.requires_grad
    assert all(parameter.grad is None for parameter in net.parameters())


class Guest:
    """A member that is on the device while it is asked, and no longer."""

    here = 0
    most = 0

    def __init__(self, net):
        self.net = net

    @contextmanager
    def resident(self):
        Guest.here += 1
        Guest.most = max(Guest.most, Guest.here)
        try:
            yield self.net
        finally:
            Guest.here -= 1


@combinations
def test_one_member_is_on_the_device_at_a_time(combine):
    x = images()
    members: list[Any] = [Guest(net) for net in NETS]
    guests = Surrogates(members, combine, hold=False)
    Guest.most = 0
    close(gradient(guests, x), gradient(Surrogates(NETS, combine), x))
    close(guests(x), Surrogates(NETS, combine)(x))
    assert (Guest.here, Guest.most) == (0, 1)

    def broken(x):
        raise ValueError("this net has a bug")

    with pytest.raises(ValueError, match="bug"):
        gradient(Surrogates(cast(Any, [Guest(broken)]), combine, hold=False), x)
    assert Guest.here == 0


@combinations
@pytest.mark.parametrize("hold", [True, False])
def test_forward_hooks_get_the_model_and_its_random_draws(combine, hold):
    seen: list[Any] = []

    def hook(number):
        @contextmanager
        def enter(model, rng):
            seen.append((number, NETS.index(model), rng.stream))
            yield
            seen.append("left")

        return enter

    x = images()
    surrogates = Surrogates(NETS, combine, hold=hold, forward_hooks=(hook(0), hook(1)), together=all_at_once(NETS))
    close(gradient(surrogates, x), gradient(Surrogates(NETS, combine), x))
    # Each member has dice of its own.
    streams = [f"{RNG.stream}/member{net}" for net in range(3)]
    once = [
        entry for net in range(3) for entry in ((0, net, streams[net]), (1, net, streams[net]), "left", "left")
    ]
    looks = not hold and combine in SHARED
    assert seen == once * (2 if looks else 1)
    seen.clear()
    surrogates(x)  # as one model they are asked as they are
    surrogates.logits(x)
    assert not seen


# Words.


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"members": []}, "an ensemble of surrogates needs at least one model."),
        ({"combine": "logit"}, "no combination 'logit'. Did you mean 'logits'? Known:"),
        *(
            ({"weights": weights}, f"weights {weights} for 3 surrogates: pass one number above 0 each.")
            for weights in ([1], [1, 2, 0], [1, 2, -1], [1, 2, float("nan")], [1, 2, float("inf")])
        ),
    ],
)
def test_invalid_surrogates_are_refused_in_one_sentence(words, sentence):
    with pytest.raises(UsageError) as error:
        Surrogates(**{"members": NETS, **words})
    assert str(error.value).startswith(sentence)


def test_targets_are_reached_by_following_the_gradient():
    """The sign: up is towards success, whatever is averaged."""
    x, goal = images(), GOALS["targeted"]
    assert goal.targets is not None
    targets = goal.targets
    for combine in COMBINATIONS:
        surrogates = Surrogates(NETS, combine)
        step = 1e-3 * mean_normalised(gradient(surrogates, x, goal))
        before, after = (
            torch.stack([-F.cross_entropy(net(point), targets, reduction="none") for net in NETS]).mean(0)
            for point in (x, x + step)
        )
        assert (after > before).float().mean() > 0.7
