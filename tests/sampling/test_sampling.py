"""Samplers against posteriors that are known: conjugate normals, and another library's sampler."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from robustkit.sampling import (
    Langevin,
    Moments,
    PreconditionedLangevin,
    cyclical,
    is_evenly_spaced,
    linear,
    normal_like,
    polynomial,
)

CHAINS = 4000


def run(
    optimizer: torch.optim.Optimizer, gradient: Callable[[int], Tensor], steps: int, noisy: bool = True
) -> None:
    """Take steps as a training loop would, all of them noisy or none."""
    (group,) = optimizer.param_groups
    (weights,) = group["params"]
    for step in range(steps):
        weights.grad = gradient(step)
        group.update(counter=step, noisy=noisy)
        optimizer.step()


def close(found: Tensor, wanted: float, draws: int) -> bool:
    """Whether a variance of independent normal draws is within five standard errors of what it should be."""
    return abs(float(found) / wanted - 1) < 5 * math.sqrt(2 / draws)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_the_variance_of_a_quadratic_is_the_posteriors(momentum: float, temperature: float) -> None:
    """C6, and the exact correction for the step's length: T / (N k) / (1 - lr k / (2 (1 + momentum)))."""
    curvature, size, lr = 2.0, 50, 0.1
    weights = torch.zeros(CHAINS, requires_grad=True)
    optimizer = Langevin([weights], lr, samples=size, temperature=temperature, momentum=momentum)
    run(optimizer, lambda _: curvature * weights.detach(), 300)
    wanted = temperature / (size * curvature) / (1 - lr * curvature / (2 * (1 + momentum)))
    assert close(weights.detach().var(), wanted, CHAINS)
    assert abs(weights.detach().mean()) < 5 * math.sqrt(wanted / CHAINS)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_mean_and_covariance_of_bayesian_linear_regression(momentum: float) -> None:
    """Correlated weights with a prior: N(m, T (X'X + N wd)^-1 s^2) with the noise variance s^2 = 1 of the loss."""
    size, decay, lr, temperature = 40, 0.1, 0.1, 1.0
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 2, generator=generator) @ torch.tensor([[1.0, 0.6], [0.0, 0.8]])
    y = x @ torch.tensor([1.0, -2.0]) + torch.randn(size, generator=generator)
    curvature = x.T @ x / size + decay * torch.eye(2)
    mean = torch.linalg.solve(curvature, x.T @ y / size)
    weights = torch.zeros(CHAINS, 2, requires_grad=True)
    optimizer = Langevin(
        [weights], lr, samples=size, temperature=temperature, momentum=momentum, weight_decay=decay
    )
    run(optimizer, lambda _: (weights.detach() @ x.T - y) @ x / size, 400)
    step = lr * curvature / (2 * (1 + momentum))
    wanted = temperature / size * torch.linalg.inv(curvature @ (torch.eye(2) - step))
    found = torch.cov(weights.detach().T)
    # Whitened, both are the identity up to Monte Carlo error.
    root = torch.linalg.inv(torch.linalg.cholesky(wanted))
    assert torch.allclose(root @ found @ root.T, torch.eye(2), atol=5 * math.sqrt(2 / CHAINS))
    assert torch.all((root @ (weights.detach().mean(0) - mean)).abs() < 5 / math.sqrt(CHAINS))


def batches(data: Tensor, weights: Tensor, batch: int) -> Callable[[int], Tensor]:
    """The gradient of half the mean squared distance to a minibatch of each chain's own."""
    generator = torch.Generator().manual_seed(batch)

    def gradient(step: int) -> Tensor:
        picked = torch.randint(len(data), (len(weights), batch), generator=generator)
        return weights.detach() - data[picked].mean(1)

    return gradient


def spreads(scale: Callable[[int], tuple[int, float]]) -> list[float]:
    """Standard deviation of chains at batch sizes 16 and 64, by N and T as a sampler is told them."""
    found = []
    data = torch.randn(256, generator=torch.Generator().manual_seed(0))
    for batch in (16, 64):
        weights = torch.zeros(1500, requires_grad=True)
        samples, temperature = scale(batch)
        optimizer = Langevin([weights], 0.004, samples=samples, temperature=temperature)
        run(optimizer, batches(data, weights, batch), 700)
        found.append(float(weights.detach().std()))
    return found


@pytest.mark.slow
def test_two_batch_sizes_have_the_same_spread() -> None:
    """The coupling of the reference shown and removed: its noise is divided by the number of batches."""
    small, large = spreads(lambda batch: (256, 1.0))
    assert abs(small / large - 1) < 0.08
    assert abs(large * math.sqrt(256) - 1) < 0.08
    small, large = spreads(lambda batch: (256, 256 * (batch / 256) ** 2))
    assert large / small > 3


@pytest.mark.slow
def test_preconditioned_chains_have_the_posteriors_variance() -> None:
    """Two weights whose curvatures differ a hundredfold; minibatches, so that the preconditioner settles."""
    scales, size, lr = torch.tensor([1.0, 10.0]), 200, 2e-4
    data = torch.randn(size, 2, generator=torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(3)
    weights = data.mean(0).repeat(1000, 1).div_(scales).requires_grad_()
    optimizer = PreconditionedLangevin([weights], lr, samples=size, temperature=1.0)

    def gradient(step: int) -> Tensor:
        picked = data[torch.randint(size, (1000, 16), generator=generator)].mean(1)
        return scales * (scales * weights.detach() - picked)

    run(optimizer, gradient, 3000)
    found = weights.detach().var(0) * size * scales**2
    assert torch.allclose(found, torch.ones(2), atol=0.3)
    assert torch.allclose(weights.detach().mean(0) * scales, data.mean(0), atol=0.02)


def test_at_temperature_0_or_without_noise_it_is_plain_descent() -> None:
    """C3 and C4, bitwise: temperature 0, and steps that are not noisy, are SGD's."""
    start = torch.randn(7, generator=torch.Generator().manual_seed(0))
    ends = []
    for temperature, noisy in ((0.0, True), (1.0, False), (1.0, True)):
        weights = start.clone().requires_grad_()

        def cubed(_: object, weights: torch.Tensor = weights) -> torch.Tensor:
            return weights.detach() ** 3

        optimizer = Langevin([weights], 0.1, samples=10, temperature=temperature, momentum=0.9, weight_decay=0.01)
        run(optimizer, cubed, 20, noisy)
        ends.append(weights.detach())
    weights = start.clone().requires_grad_()
    plain = torch.optim.SGD([weights], 0.1, momentum=0.9, weight_decay=0.01)
    run(plain, lambda _: weights.detach() ** 3, 20)
    assert torch.equal(ends[0], weights.detach())
    assert torch.equal(ends[1], weights.detach())
    assert not torch.equal(ends[2], weights.detach())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_one_step_from_rest_has_the_canonical_scale(momentum: float) -> None:
    """C3: variance 2 lr T / N, times the friction; at T = N / batches^2 it is the reference's."""
    lr, size, count = 0.5, 50_000, 782
    temperature = size / count**2
    weights = torch.zeros(20_000, requires_grad=True)
    optimizer = Langevin([weights], lr, samples=size, temperature=temperature, momentum=momentum)
    run(optimizer, lambda _: torch.zeros_like(weights), 1)
    wanted = 2 * (1 - momentum) * lr / count**2
    assert close(weights.detach().var(), wanted, 20_000)
    assert momentum > 0 or abs(math.sqrt(wanted) - 0.00128) < 1e-5  # measured on the reference


def test_a_warm_restart_does_not_carry_out_the_noise_of_the_cycles_end() -> None:
    """Noise in gradients, at tiny rates, would leave a momentum that throws the weights at a high one."""
    weights = torch.zeros(1000, requires_grad=True)
    optimizer = Langevin([weights], 1e-6, samples=100, temperature=1.0, momentum=0.9)
    run(optimizer, lambda _: torch.zeros_like(weights), 50)
    before = weights.detach().clone()
    assert before.abs().max() < 0.01
    optimizer.param_groups[0]["lr"] = 0.5
    run(optimizer, lambda _: torch.zeros_like(weights), 3, noisy=False)
    assert torch.equal(weights.detach(), before)


def test_noise_is_a_function_of_seed_and_step_alone() -> None:
    shapes = [torch.empty(3, 5), torch.empty(4, dtype=torch.float64)]
    first = normal_like(shapes, 0, "a", 7)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    again = normal_like(shapes, 0, "a", 7)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert [(tensor.shape, tensor.dtype) for tensor in first] == [(s.shape, s.dtype) for s in shapes]
    for other in (normal_like(shapes, 1, "a", 7), normal_like(shapes, 0, "b", 7), normal_like(shapes, 0, "a", 8)):
        assert not torch.equal(first[0], other[0])
    assert normal_like([], 0, "a", 0) == []


def test_long_noise_does_not_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    from robustkit.sampling import noise

    monkeypatch.setattr(noise, "CHUNK", 1000)
    (drawn,) = normal_like([torch.empty(3500)], 0, "a", 0)
    assert len(drawn.unique()) > 3490
    assert abs(drawn.mean()) < 0.09
    assert close(drawn.var(), 1, 3500)


def test_a_chain_resumed_is_the_chain() -> None:
    """C5 for optimisers: their state and the step's number are enough."""
    for kind in (Langevin, functools.partial(Langevin, momentum=0.9), PreconditionedLangevin):
        ends = []
        for stop in (0, 5):
            weights = torch.ones(6, requires_grad=True)
            optimizer = kind([weights], 0.05, samples=10, temperature=1.0)
            for step in range(10):
                if stop and step == stop:
                    saved = optimizer.state_dict()
                    weights = weights.detach().clone().requires_grad_()
                    optimizer = kind([weights], 0.05, samples=10, temperature=1.0)
                    optimizer.load_state_dict(saved)
                weights.grad = weights.detach().sin()
                optimizer.param_groups[0].update(counter=step, noisy=True)
                optimizer.step()
            ends.append(weights.detach())
        assert torch.equal(*ends)


def test_the_cyclical_rate() -> None:
    """C1, with the numbers of the reference."""
    rates = [cyclical(step, 10, 0.5) for step in range(30)]
    wanted = [0.5, 0.4878, 0.4523, 0.3969, 0.3273, 0.25, 0.1727, 0.1031, 0.0477, 0.0122]
    assert rates[:10] == pytest.approx(wanted, abs=5e-5)
    assert rates[:10] == rates[10:20] == rates[20:]
    assert min(rates) > 0


def test_other_rates_and_steps_spread_evenly() -> None:
    assert [linear(step, 10, 1.0, 0.2) for step in (0, 5, 7, 9, 40)] == pytest.approx([1, 1, 0.6, 0.2, 0.2])
    assert polynomial(0, 0.5, 0.55) == 0.5
    assert polynomial(3, 0.5, 0.5) == pytest.approx(0.25)
    picked = [step for step in range(-5, 25) if is_evenly_spaced(step, 20, 4)]
    assert picked == [4, 9, 14, 19]
    for length, count in ((7, 3), (50, 40), (5, 5)):
        assert sum(is_evenly_spaced(step, length, count) for step in range(length)) == count
        assert is_evenly_spaced(length - 1, length, count)


def states(count: int) -> list[dict[str, Tensor]]:
    """States of a net as they are kept: weights, running statistics, a whole number."""
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "a.weight": torch.randn(3, 4, generator=generator),
            "b.running_mean": torch.randn(4, generator=generator),
            "b.running_var": torch.rand(4, generator=generator),
            "b.num_batches_tracked": torch.tensor(step),
            "constant": torch.full((2,), 0.1),
        }
        for step in range(count)
    ]


def test_moments_are_those_of_the_states() -> None:
    kept = states(9)
    moments = Moments(kept, rank=4)
    whole = torch.stack([state["a.weight"] for state in kept])
    assert torch.allclose(moments.mean["a.weight"], whole.mean(0), atol=1e-6)
    assert torch.allclose(moments.variance()["a.weight"], whole.var(0, correction=0), atol=1e-6)
    assert len(moments.deviations) == 4
    last = [whole[place] - whole[: place + 1].mean(0) for place in range(5, 9)]
    for column, wanted in zip(moments.deviations, last, strict=True):
        assert torch.allclose(column["a.weight"], wanted, atol=1e-6)
    drawn = moments.draw(0, 3.0, seed=1)
    assert set(drawn) == set(kept[0])
    assert torch.equal(drawn["constant"], kept[0]["constant"])
    for name in ("b.running_mean", "b.running_var", "b.num_batches_tracked"):
        assert torch.equal(drawn[name], kept[-1][name])


def test_draws_without_spread_are_the_mean() -> None:
    """F: scale 0 is the mean network and a single snapshot has no variance, bitwise."""
    many, one = Moments(states(5), rank=3), Moments(states(1), rank=3)
    assert torch.equal(many.draw(0, 0.0, seed=0)["a.weight"], many.mean["a.weight"])
    assert torch.equal(one.draw(0, 1.0, seed=0)["a.weight"], states(1)[0]["a.weight"])
    assert all((variance >= 0).all() for variance in many.variance().values())


def test_the_variance_of_nearly_equal_states_is_not_negative() -> None:
    """Where a mean of squares less a square of means would be: 1 +- 1e-4 in float32."""
    near = [{"w": 1 + 1e-4 * torch.tensor([sign])} for sign in (-1.0, 1.0)] * 50
    assert float(Moments(near).variance()["w"]) == pytest.approx(1e-8, rel=1e-2)


@pytest.mark.parametrize("rank", [0, 4])
def test_draws_have_the_fitted_covariance(rank: int) -> None:
    """F: the spread of 1000 draws is the scale times the root of the variance; with columns, half and half."""
    moments = Moments(states(9), rank)
    drawn = torch.stack([moments.draw(number, 1.5, seed=0)["a.weight"].flatten() for number in range(1000)])
    diagonal = moments.variance()["a.weight"].flatten().diag()
    wanted = diagonal
    if rank:
        columns = torch.stack([column["a.weight"].flatten() for column in moments.deviations])
        wanted = (diagonal + columns.T @ columns / (rank - 1)) / 2
    root = wanted.diag().sqrt()
    found = torch.cov(drawn.T) / 1.5**2
    assert torch.allclose(found / root.outer(root), wanted / root.outer(root), atol=0.22)
    assert torch.equal(moments.draw(3, 1.5, seed=0)["a.weight"].flatten(), drawn[3])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_chains_agree_with_the_library_posteriors(momentum: float) -> None:
    """Bayesian logistic regression, which is no normal: mean and variance as `posteriors` 0.1 samples them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("posteriors")
        from posteriors.sgmcmc import sghmc, sgld
    # Its SGHMC is explicit in the momentum, so that short steps are needed for it to be right.
    size, decay, lr, steps, chains = 30, 0.1, 0.01 if momentum else 0.2, 500, 3000
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(size, 2, generator=generator)
    y = (x @ torch.tensor([2.0, 0.0]) + 0.5 > 0).float()

    def potential(weights: Tensor) -> Tensor:
        logits = weights @ x.T
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, y.expand_as(logits), reduction="none")
        return size * (loss.mean(1) + decay / 2 * weights.square().sum(1)).sum()

    weights = torch.zeros(chains, 2, requires_grad=True)
    optimizer = Langevin([weights], lr, samples=size, temperature=0.5, momentum=momentum, weight_decay=decay)
    run(optimizer, lambda _: ((weights.detach() @ x.T).sigmoid() - y) @ x / size, steps)

    def log_posterior(parameters: Tensor, batch: object) -> tuple[Tensor, Tensor]:
        return -potential(parameters), torch.tensor(0.0)

    if momentum:
        pace = math.sqrt(lr / size)
        sampler = sghmc.build(log_posterior, lr=pace, alpha=(1 - momentum) / pace, temperature=0.5, momenta=0.0)
    else:
        sampler = sgld.build(log_posterior, lr=lr / size, temperature=0.5)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = sampler.init(torch.zeros(chains, 2))
        for _ in range(steps):
            state, _ = sampler.update(state, None)
    theirs, ours = state.params.detach(), weights.detach()
    assert torch.all((theirs.mean(0) - ours.mean(0)).abs() < 5 * ours.std(0) * math.sqrt(2 / chains))
    assert torch.all((theirs.var(0) / ours.var(0)).log().abs() < 5 * math.sqrt(4 / chains) * 1.5)
