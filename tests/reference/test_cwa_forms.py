"""Every published form of the common weakness attack against a literal loop: CSE, and CWA with VMI, SSA and Adam.

The loops draw the numbers that the product draws; all else is written from the paper's Algorithm 1, or from a
description of the authors' code where the paper is silent (VMI).
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch

from robustkit.attack_api import Surrogates, compose
from robustkit.core.criteria import Goal
from robustkit.core.errors import UsageError
from robustkit.core.rng import RowRng
from robustkit.core.threat import Linf
from robustkit.registry import find, parse_attack

EPS, STEPS, BETA, SIZE = 16 / 255, 4, 0.05, (2, 3, 4)


class Exact(Linf):
    """Eps as it is, where the product rounds it down to float32."""

    @property
    def radius(self):
        return float(self.eps)


DRAW = torch.Generator().manual_seed(0)
WEIGHTS = [
    (torch.randn(5, 24, generator=DRAW).double(), torch.randn(4, 5, generator=DRAW).double()) for _ in range(3)
]
X = 0.05 + 0.9 * torch.rand(5, *SIZE, generator=DRAW).double()
LABELS = torch.arange(5) % 4
RNG = RowRng(0, "cwa", torch.arange(3, 8))


def net(inner, outer):
    return lambda x: ((x.flatten(1)[:, None] * inner).sum(2).tanh()[:, None] * outer).sum(2)


NETS = [net(*weights) for weights in WEIGHTS]


def found(text):
    attack = compose(parse_attack(text, "linf"))
    return attack(Surrogates(NETS), X, Goal(LABELS), Exact(Fraction(16, 255)), rng=RNG)


def slope(models, x):
    """The gradient of the mean logits' loss."""
    point = x.detach().requires_grad_()
    logits = sum(model(point) for model in models) / len(models)
    return torch.autograd.grad(torch.nn.functional.cross_entropy(logits, LABELS, reduction="sum"), point)[0]


def clip(x):
    return x.clamp(X - EPS, X + EPS).clamp(0, 1)


def length(x):
    return x.flatten(1).norm(dim=1)[:, None, None, None]


def noise(stream, step, kind="uniform"):
    """What the product draws in a step for one of its calls."""
    rng = RowRng(0, f"cwa/{stream}", RNG.ids, step=step)
    return 2 * rng.uniform(*SIZE).double() - 1 if kind == "uniform" else rng.normal(*SIZE).double()


def literal(gradient, *, reverse=EPS / 15, outer="sign", mu=1.0, starts=1, spread=0.0):
    """Algorithm 1; `gradient(models, x, call, step)` is asked for each one."""
    x, sum_out, inner = X, torch.zeros_like(X), [torch.zeros_like(X) for _ in range(starts)]
    for step in range(1, STEPS + 1):
        gains = []
        for copy in range(starts):
            place = f"vmi-mean{copy}/" if spread else ""
            begin = x + spread * noise(place[:-1], step) if spread else x
            point = (
                clip(begin - reverse * gradient(NETS, begin, f"{place}sam0", step).sign()) if reverse else begin
            )
            for number, model in enumerate(NETS):
                g = gradient([model], point, f"{place}cse{number}", step)
                inner[copy] = mu * inner[copy] + g / length(g)
                point = clip(point + BETA * inner[copy])
            gains.append(point - begin)
        sum_out = mu * sum_out + sum(gains) / starts
        x = clip(x + (EPS / 5 * sum_out.sign() if outer == "sign" else sum_out))
    return x


def plain(models, x, call, step):
    return slope(models, x)


def neighbours(models, x, call, step):
    """The mean at 8 neighbours, but of the step back."""
    if len(models) > 1:
        return slope(models, x)
    return sum(slope(models, x + 1.5 * EPS * noise(f"{call}/vmi-mean{k}", step)) for k in range(8)) / 8


def dct(size):
    point = torch.arange(size).double()
    matrix = (2 / size) ** 0.5 * torch.cos(math.pi / size * (point + 0.5) * point[:, None])
    matrix[0] /= 2**0.5
    return matrix


def spectra(models, x, call, step):
    """The mean over two images with changed spectra (Long et al. 2022, Algorithm 1)."""
    total, high, wide = 0, dct(SIZE[1]), dct(SIZE[2])
    for k in range(2):
        point = x.detach().requires_grad_()
        spectrum = high @ (point + EPS * noise(f"{call}/ssa-noise{k}", step, "normal")) @ wide.T
        moved = high.T @ (spectrum * (1 + 0.5 * noise(f"{call}/ssa-scale{k}", step))) @ wide
        logits = sum(model(moved) for model in models) / len(models)
        loss = torch.nn.functional.cross_entropy(logits, LABELS, reduction="sum")
        total = total + torch.autograd.grad(loss, point)[0] / 2
    return total


def variance_tuned():
    """Wang and He's recursion for each member, and for all together in the step back."""
    last: dict[Any, Any] = {}

    def gradient(models, x, call, step):
        who = "all" if len(models) > 1 else models[0]
        now, tuned = slope(models, x), 0
        if who in last:
            models, then, call_then, before = last[who]
            neighbours = [then + 1.5 * EPS * noise(f"{call_then}/vmi{k}", step - 1) for k in range(1, 4)]
            tuned = sum(slope(models, point) for point in neighbours) / 3 - before
        last[who] = models, x, call, now
        return now + tuned

    return gradient


WORDS = f"steps={STEPS},beta_raw={BETA}"
CSE = find("recipe", "cse")()[:-1]
FORMS = {
    f"mi-cse({WORDS},step_size=0.2eps)": lambda: literal(plain, reverse=0),
    f"cwa({WORDS},step_size=0.2eps)": lambda: literal(plain),
    f"{CSE},{WORDS})": lambda: literal(plain, reverse=0, outer="plain", mu=0),
    f"cwa({WORDS},step_size=0.2eps)+vmi(copies=3)": lambda: literal(variance_tuned()),
    f"cwa({WORDS},step_size=0.2eps)+vmi-mean(copies=8,of=member)": lambda: literal(neighbours),
    f"cwa({WORDS},step_size=0.2eps)+vmi-mean(copies=8,beta=1,of=step)": lambda: literal(
        plain, starts=8, spread=EPS
    ),
    f"cwa({WORDS},step_size=0.2eps)+ssa(copies=2)": lambda: literal(spectra),
    f"mi-cse({WORDS},step_size=0.2eps)+ssa(copies=2)": lambda: literal(spectra, reverse=0),
}


@pytest.mark.parametrize("text", FORMS)
def test_each_form_is_its_loop(text):
    torch.testing.assert_close(found(text), FORMS[text](), rtol=0, atol=1e-10)


def test_raw_cse_goes_along_gradients_as_they_are():
    x = X
    for _ in range(STEPS):
        point = x
        for model in NETS:
            point = clip(point + 0.01 * slope([model], point))
        x = clip(x + 0.5 * (point - x))
    text = (
        f"mi-cse(steps={STEPS},beta_raw=0.01,raw=true,update=plain,momentum=0,inner_momentum=0,step_size=0.5eps)"
    )
    torch.testing.assert_close(found(text), x, rtol=0, atol=1e-10)


def test_adam_cwa_is_adam_on_what_the_loop_gains():
    x, inner, mean, square = X, torch.zeros_like(X), 0, 0
    for step in range(1, STEPS + 1):
        point = clip(x - EPS / 15 * slope(NETS, x).sign())
        for model in NETS:
            g = slope([model], point)
            inner = inner + g / length(g)
            point = clip(point + BETA * inner)
        mean, square = 0.9 * mean + 0.1 * (point - x), 0.999 * square + 0.001 * (point - x) ** 2
        x = clip(x + 1e-3 * mean / (1 - 0.9**step) / ((square / (1 - 0.999**step)).sqrt() + 1e-8))
    ours = found(f"cwa({WORDS},update=adam,step_size=0.001px)")
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-10)


def test_the_cost_of_the_forms():
    """W7, of three members: VMI_Inner T (n + 8n), VMI_Outer T (8n + 8n), CSE Tn."""
    for text, price in (("cse", 30), ("vmi-inner-cwa", 10 * (3 + 24)), ("vmi-outer-cwa", 10 * (24 + 24))):
        calls: list[Any] = []

        def counted(model, calls=calls):
            return lambda x: calls.append(len(x)) or model(x)

        attack = compose(parse_attack(text, "linf"))
        one = torch.tensor([0])
        attack(
            Surrogates([counted(m) for m in NETS]),
            X[one],
            Goal(LABELS[one]),
            Exact(Fraction(EPS)),
            rng=RNG.select(one),
        )
        assert sum(calls) == price
        assert price <= 3 * attack.gradients <= 2 * price


def test_whose_mean_must_be_known():
    with pytest.raises(UsageError, match=r"no of 'steps'\. Did you mean 'step'\?"):
        parse_attack("mi-fgsm+vmi-mean(of=steps)", "linf")
