"""Own attacks against their authors' code, or foolbox's: same iterates, same norms or smaller."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from robustkit.attack_api import Rows, query, query_rows
from robustkit.core.criteria import Goal
from robustkit.core.rng import RowRng
from robustkit.core.threat import ThreatModel
from robustkit.registry import make

OFFICIAL = {"linf": "Linf", "l2": "L2", "l1": "L1"}
EPS = {"linf": 1 / 32, "l2": 1 / 4, "l1": 4.0}


def net(dtype=torch.float64, seed=0):
    """A smooth net: gradients do not jump where rounding differs."""
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 5 * 7, 12), nn.Tanh(), nn.Linear(12, 5)
    return nn.Sequential(*layers).to(dtype).requires_grad_(False)


def images(count=6, dtype=torch.float64, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return 0.1 + 0.8 * torch.rand(count, 3, 7, 9, generator=draw, dtype=dtype)


def rows_of(x, goal, threat, aim=None):
    return Rows(x, goal, threat, RowRng(0, "parity", torch.arange(len(x))), aim or goal)


def iterates(attack, model, rows, start, count):
    """Return the points that an attack asks for, from this start and whether or not they succeed."""
    state = {**attack.init(rows), "x": start}
    seen = [start]
    for number in range(count):
        rows = replace(rows, rng=rows.rng.at(step=number + 1))
        state = attack.step(rows, state, query(model, state["x"], rows.aim, attack.loss))
        seen.append(state["x"])
    return torch.stack(seen)


class Recorder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.seen = model, []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return self.model(x)


@pytest.fixture
def in_float64(monkeypatch):
    """Let pyautoattack compute in float64: its tables follow the default, its casts are undone."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def official_apgd(loss, norm, steps, model, x, goal, target, start):
    from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted

    kind, more = (APGDAttack, {"loss": loss}) if target is None else (APGDAttack_targeted, {})
    official = kind(model, norm=OFFICIAL[norm], eps=EPS[norm], n_iter=steps, device="cpu", **more)
    official.init_hyperparam(x)
    official.y_target = target
    if norm == "l1":
        official.n_iter_orig, official.use_largereps = steps, True
        third = math.ceil(0.3 * steps)
        radii, counts = [3 * EPS[norm], 2 * EPS[norm], EPS[norm]], [third, third, steps - 2 * third]
        official.decr_eps_pgd(x, goal.labels, radii, counts)
    else:
        official.attack_single_run(x, goal.labels, x_init=start)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("loss", ["ce", "dlr", "targeted dlr"])
@pytest.mark.parametrize("steps", [100, 8])  # with 8 each step is reviewed, the first against an empty entry
def test_apgd_makes_the_authors_iterates(norm, loss, steps, in_float64, monkeypatch):
    from pyautoattack import autopgd_base

    # Rounding noise of their projection counts as a change there; here nothing below it may.
    monkeypatch.setattr(autopgd_base, "L0_norm", lambda z: (z.abs() > 1e-12).double().view(z.shape[0], -1).sum(-1))
    monkeypatch.setattr(autopgd_base, "check_zero_gradients", lambda *args, **more: None)
    model, x = net(), images()
    goal = Goal(model(x).argmax(1))
    target = (goal.labels + 2) % 5 if loss == "targeted dlr" else None
    threat = ThreatModel.parse(f"{norm}:{EPS[norm]}")
    attack = make("apgd" if target is None else "apgd-t", loss=loss.split()[-1], steps=steps)
    rows = rows_of(x, goal, threat, Goal(goal.labels, target))
    recorder = Recorder(model)
    official_apgd(loss, norm, steps, recorder, x, goal, target, attack.init(rows)["x"])
    theirs = torch.stack(recorder.seen)
    start = torch.where((theirs[0] - x).abs() > 1e-12, theirs[0], x)
    ours = iterates(attack, model, rows, start, len(theirs) - 1)
    assert len(ours) == attack.loop_options(norm).steps + 1
    assert (ours[1:] - ours[:-1]).abs().amax() > EPS[norm] / 100
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_apgds_step_sizes_are_reviewed_where_the_paper_says():
    from robustkit.attacks.gradient.apgd import _plan

    plan = _plan(100, "linf", None)
    reviews = [(place, window) for place, (_, _, window, _) in enumerate(plan) if window]
    assert reviews == [(22, 22), (41, 19), (57, 16), (70, 13), (80, 10), (87, 7), (93, 6), (99, 6)]


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_fab_comes_as_near_as_the_authors(norm, targeted):
    from pyautoattack.fab_pt import FABAttack_PT

    model, x = net(torch.float32, seed=3), images(12, torch.float32)
    with torch.no_grad():
        goal = Goal(model(x).argmax(1))
        order = model(x).argsort(1, descending=True)
    official = FABAttack_PT(model, norm=OFFICIAL[norm], n_iter=100, eps=EPS[norm], device="cpu")
    official.target_class = 2
    theirs = official.attack_single_run(x, goal.labels, is_targeted=targeted)
    threat = ThreatModel.parse(f"{norm}:{EPS[norm]}")
    attack = make("fab-t" if targeted else "fab")
    aim = Goal(goal.labels, order[:, 1]) if targeted else goal
    rows = rows_of(x, goal, threat, aim)
    state, nearest = attack.init(rows), torch.full((len(x),), math.inf, dtype=torch.float64)
    for _ in range(attack.loop_options(norm).steps + 1):
        answer = query_rows(attack, model, rows, state, True)
        reached = goal.reached(answer.logits)
        nearest = torch.where(reached, torch.minimum(nearest, threat.distance(state["x"], x)), nearest)
        if state["last"].all():
            break
        ended = state["last"]
        stepped = attack.step(rows, state, answer)
        state = {
            name: torch.where(ended.view(-1, *[1] * (value.dim() - 1)), state[name], value)
            for name, value in stepped.items()
        }
    assert state["last"].all()
    reference = threat.distance(theirs, x)
    assert (reference > 0).all()
    assert (nearest <= 1.01 * reference).all(), (nearest / reference).tolist()


def test_ddn_makes_foolboxs_iterates():
    import foolbox

    model, x = net().eval(), images()
    goal = Goal(model(x).argmax(1))
    recorder = Recorder(model).eval()
    wrapped = foolbox.PyTorchModel(recorder, bounds=(0, 1), device="cpu")
    official = foolbox.attacks.DDNAttack(steps=60, init_epsilon=1.0, gamma=0.05)
    official.run(wrapped, x, foolbox.criteria.Misclassification(goal.labels))
    theirs = torch.stack(recorder.seen)
    rows = rows_of(x, goal, ThreatModel.parse("l2:0.1"))
    ours = iterates(make("ddn", steps=60), model, rows, x, len(theirs) - 1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert torch.stack([goal.reached(model(point)) for point in ours]).any(0).all()
