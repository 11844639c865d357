"""What every attack must do, each check a function that raises AssertionError."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustkit.attack_api import RowWise
from robustkit.core.rng import RowRng
from robustkit.core.threat import ThreatModel
from robustkit.registry import spec
from robustkit.registry.construction import as_attack
from robustkit.testing.problems import PROBLEMS, Problem, corners, plane, rng_of, sphere, threat_at

# How many times the nearest adversarial distance eps is where an attack must succeed: with gradients, and without.
WITH_GRADIENTS, WITHOUT = 1.5, 6.0


def check_attack(attack: Any, *, norms: Sequence[str] | None = None, distance: float | None = None) -> None:
    """Check that an attack keeps the contract of attacks, in seconds.

    On classifiers whose nearest adversarial points are known it must succeed where eps is well above that distance
    and fail where it is below; return images inside the threat, of the same shape and type; give the same bytes
    for the same seed, and, unless it is registered as `coupled`, the same result for an image in any batch; leave
    the model, its inputs and the global random generators as they were; and cost what its `budget` says. An attack
    with `access="decision"` must use nothing but predicted labels.

    Args:
        attack: an object or class under `@attack(...)`, or a function `(model, x, y, eps) -> x_adv`. Give one
            with less effort than the defaults where those take long.
        norms: in which to check it; those that it is registered for by default.
        distance: how many times the nearest adversarial distance eps is where the attack must succeed: 1.5 by
            default for attacks that use gradients, 6 for others.

    Raises:
        AssertionError: if it does not keep the contract; the message says what it did.
        UsageError: if it is no attack.
    """
    attack = as_attack(attack)
    coupled = attack.info.coupled
    if distance is None:
        distance = WITHOUT if attack.info.access in ("score", "decision") else WITH_GRADIENTS
    for norm in norms or attack.info.norms:
        for make in PROBLEMS.values():
            check_succeeds(attack, make(), norm, coupled=coupled, factor=distance)
            check_fails(attack, make(), norm, coupled=coupled)
        problem = plane(3)
        near, far = threat_at(problem, norm, distance), threat_at(problem, norm, 0.9)
        check_succeeds(attack, problem.rows(torch.tensor([1])), norm, coupled=coupled, factor=distance)
        check_repeatable(attack, sphere(), threat_at(sphere(), norm, 0.9))
        check_no_side_effects(attack, plane(3), near, trainable=not coupled)
        if not coupled:
            check_row_independent(attack, plane(5), threat_at(plane(5), norm, 0.9))
            check_global_generators(attack, problem, far)
            for dtype in (torch.float32, torch.float64):
                edges, ball = corners(problem.to(dtype), norm)
                check_inside(run(attack, edges, ball), edges.x, ball)
        if attack.info.access == "decision":
            check_labels_only(attack, problem, near)
        if isinstance(attack, RowWise):
            check_budget(attack, plane(5), norm)


def run(attack: Any, problem: Problem, threat: ThreatModel, *, seed: int = 0, rng: RowRng | None = None) -> Tensor:
    """Return what the attack returns, the global random generators seeded as the engine does it."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    found: Tensor = attack(
        problem.model, problem.x.clone(), problem.goal, threat, rng=rng or rng_of(problem, seed)
    )
    return found


def check_succeeds(
    attack: Any, problem: Problem, norm: str, *, coupled: bool = False, factor: float = WITH_GRADIENTS
) -> None:
    """Check that every image is fooled where eps is `factor` times the nearest adversarial distance."""
    threat = threat_at(problem, norm, factor)
    found = run(attack, problem, threat)
    check_inside(found, problem.x, threat, coupled)
    fooled = problem.goal.reached(problem.model(threat.project(found, problem.x)))
    assert fooled.all(), (
        f"{_name(attack)} fooled the model on {int(fooled.sum())} of {len(fooled)} images under {threat}, where "
        f"each has an adversarial point at 1/{factor:g} of that distance; "
        "a weaker search needs a larger `distance`, in robustkit a row in SLACK of tests/contract/test_attacks.py"
    )


def check_fails(attack: Any, problem: Problem, norm: str, *, coupled: bool = False) -> None:
    """Check that no image is fooled where eps is 0.9 times the nearest adversarial distance."""
    threat = threat_at(problem, norm, 0.9)
    found = run(attack, problem, threat)
    check_inside(found, problem.x, threat, coupled)
    fooled = problem.goal.reached(problem.model(threat.project(found, problem.x)))
    assert not fooled.any(), f"{_name(attack)} fooled the model under {threat}, where no point of the ball does"


def check_inside(found: Tensor, x: Tensor, threat: ThreatModel, coupled: bool = False) -> None:
    """Check that images are inside ball and box, of the shape, type and device of the clean ones, and detached."""
    assert found.shape == x.shape, f"the attack returned shape {tuple(found.shape)} for images of {tuple(x.shape)}"
    assert found.dtype == x.dtype, f"the attack returned {found.dtype} for images of {x.dtype}"
    assert found.device == x.device, f"the attack returned images on {found.device} for images on {x.device}"
    assert not found.requires_grad, "the attack returned images that require gradients: detach them"
    inside = threat.contains(threat.project(found, x) if coupled else found, x)
    assert inside.all(), (
        f"{int((~inside).sum())} of {len(x)} images are outside {threat} or [0, 1]: distances up to "
        f"{threat.distance(found, x).max().item():.8g}"
    )


def check_repeatable(attack: Any, problem: Problem, threat: ThreatModel) -> None:
    """Check that the same seed gives the same bytes, and another seed, stream or image other random starts."""
    first = run(attack, problem, threat)
    assert torch.equal(first, run(attack, problem, threat)), f"{_name(attack)}: the same seed gave other images"
    if getattr(attack, "random_start", False):
        # Longer or more steps may end in the same corner.
        attack = replace(attack, steps=1, **({"step_size": "0.1eps"} if hasattr(attack, "step_size") else {}))
        first = run(attack, problem, threat)
        for rng in (rng_of(problem, 1), rng_of(problem, 0, "other")):
            other = run(attack, problem, threat, rng=rng)
            assert not torch.equal(first, other), (
                f"{_name(attack)}: its random start ignores the rng that it is given"
            )


def check_row_independent(attack: Any, problem: Problem, threat: ThreatModel) -> None:
    """Check that an image has the same result alone, in a batch, and in any order."""
    rng = rng_of(problem)
    whole = run(attack, problem, threat)
    for order in ([4, 2, 0, 3, 1], [3, 1], [0], [1], [2], [3], [4]):
        index = torch.tensor(order)
        part = run(attack, problem.rows(index), threat, rng=rng.select(index))
        assert torch.equal(part, whole[index]), (
            f"{_name(attack)}: images {order} in a batch of their own have another result than among all: draw "
            "random numbers from rng, look at no other row, or register the attack as coupled"
        )


def check_labels_only(attack: Any, problem: Problem, threat: ThreatModel) -> None:
    """Check that a decision-based attack returns the same for a model whose logits hold its predictions only."""

    def labels(x: Tensor) -> Tensor:
        logits: Tensor = problem.model(x)
        return torch.nn.functional.one_hot(logits.argmax(1), logits.shape[1]).to(logits)

    same = torch.equal(run(attack, problem, threat), run(attack, replace(problem, model=labels), threat))
    assert same, f"{_name(attack)} is registered with access='decision' and uses more than the predicted labels"


def check_global_generators(attack: Any, problem: Problem, threat: ThreatModel) -> None:
    """Check that the global generators of torch, numpy and Python are not used."""
    torch.manual_seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    attack(problem.model, problem.x.clone(), problem.goal, threat, rng=rng_of(problem))
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    assert torch.equal(before[0], after[0]), f"{_name(attack)} draws from torch's global generator: draw from rng"
    assert before[1] == after[1], f"{_name(attack)} draws from numpy's global generator: draw from rng"
    # The jaxtyping hook draws from Python's own generator to pick what it checks.
    hooked = hasattr(ThreatModel.project, "__wrapped__")
    assert before[2] == after[2] or hooked, f"{_name(attack)} draws from Python's global generator: draw from rng"


def check_no_side_effects(attack: Any, problem: Problem, threat: ThreatModel, *, trainable: bool = True) -> None:
    """Check that inputs, parameters, their gradients, mode, hooks and global settings are left as they were."""
    model, x, goal, rng = problem.model, problem.x.clone(), problem.goal, rng_of(problem)
    model.train(trainable)
    for parameter in model.parameters():
        parameter.requires_grad_(trainable)
        parameter.grad = torch.full_like(parameter, 0.25) if trainable else None
    state = {name: value.clone() for name, value in model.state_dict().items()}
    kept = [value.clone() for value in (x, goal.labels, rng.ids)]
    settings = _settings()
    found = attack(model, x, goal, threat, rng=rng)
    assert _settings() == settings, f"{_name(attack)} changed torch's global settings"
    assert all(map(torch.equal, kept, (x, goal.labels, rng.ids))), f"{_name(attack)} changed its inputs in place"
    assert not x.requires_grad, f"{_name(attack)} left requires_grad set on its input"
    assert x.grad is None, f"{_name(attack)} left a gradient on its input"
    assert found is not x or not trainable, f"{_name(attack)} returned its input, not new images"
    assert model.training == trainable, f"{_name(attack)} changed the model's train or eval mode"
    for module in model.modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        assert not any(hooks), f"{_name(attack)} left hooks on the model"
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), f"{_name(attack)} changed the model's {name}"
    for parameter in model.parameters():
        assert parameter.requires_grad == trainable, f"{_name(attack)} changed requires_grad of the parameters"
        same = parameter.grad is None or (parameter.grad == 0.25).all()
        assert same, f"{_name(attack)} changed the gradients of the model's parameters: use torch.autograd.grad"


def count_passes(attack: Any, problem: Problem, threat: ThreatModel) -> tuple[int, int]:
    """Return the forward and backward passes, in images."""
    seen = {"forwards": 0, "backwards": 0}

    def model(x: Tensor) -> Tensor:
        seen["forwards"] += len(x)
        logits: Tensor = problem.model(x)
        if logits.requires_grad:
            logits.register_hook(  # type: ignore[no-untyped-call]
                lambda g: seen.__setitem__("backwards", seen["backwards"] + len(g))
            )
        return logits

    run(attack, replace(problem, model=model), threat)
    return seen["forwards"], seen["backwards"]


def check_budget(attack: Any, problem: Problem, norm: str) -> None:
    """Check that an image that is not fooled costs what `budget` says, and more effort costs more.

    FAB's budget is a bound: it saves a query where it has not crossed the boundary.
    """
    threat, classes, spent = threat_at(problem, norm, 0.5), len(problem.model.weight), []
    for effort in (2, 5):
        fields = {"queries" if hasattr(attack, "queries") else "steps": effort, "restarts": 2, "doubt": 1e9}
        tried = replace(attack, **{name: value for name, value in fields.items() if name in spec(attack)})
        forwards, backwards = count_passes(tried, problem, threat)
        budget = tried.budget(classes, norm) * len(problem.x)
        bound = hasattr(attack, "eta")
        exact = budget / 2 <= forwards <= budget if bound else forwards == budget
        assert exact, f"{_name(tried)} took {forwards} forward passes; its budget says {budget}"
        most = forwards * (classes - 1 if bound else 1)
        assert backwards < most, f"{_name(tried)} took {backwards} backward passes and {forwards} forward passes"
        needs = tried.info.access == "gradient"
        assert (backwards > 0) == needs, (
            f"{_name(tried)} has access {tried.info.access!r} and took {backwards} backward passes"
        )
        spent.append(forwards)
    assert spent[1] > spent[0], f"{_name(attack)}: more steps or queries cost no more passes"


def _settings() -> tuple[object, ...]:
    return torch.is_grad_enabled(), torch.get_default_dtype(), torch.backends.cudnn.deterministic


def _name(attack: Any) -> str:
    return str(getattr(attack, "name", getattr(getattr(attack, "info", None), "name", type(attack).__name__)))
