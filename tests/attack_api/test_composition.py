"""Compositions of a rule and techniques: the order of the calls, their cost, their random numbers."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from robustkit import registry
from robustkit.attack_api import (
    Composition,
    OracleWrapper,
    Rows,
    SurrogateOracle,
    Surrogates,
    Technique,
    ascend,
    compose,
    split_rng,
)
from robustkit.core.criteria import Goal
from robustkit.core.errors import UsageError
from robustkit.core.rng import RowRng
from robustkit.core.threat import Linf, ThreatModel
from robustkit.registry import Info, catalog, find, make, parse_attack

X = 0.3 + 0.4 * torch.rand(4, 2, 2, 3, generator=torch.Generator().manual_seed(0)).double()
GOAL = Goal(torch.arange(4) % 3, (torch.arange(4) + 1) % 3)
THREAT = ThreatModel.parse("linf:1/16")
RNG = RowRng(5, "transfer", torch.arange(20, 24))
RULES = sorted(name for name, entry in catalog("attack").items() if entry.info.ascent)

rules = pytest.mark.parametrize("name", RULES)


class Net:
    """Tanh of a linear map, mapped again; keeps how many images it saw, and whether for a gradient."""

    def __init__(self, seed=1):
        draw = torch.Generator().manual_seed(seed)
        self.inner = torch.randn(6, 12, generator=draw, dtype=torch.float64)
        self.outer = torch.randn(3, 6, generator=draw, dtype=torch.float64)
        self.queries = []

    def __call__(self, x):
        self.queries.append((len(x), x.requires_grad))
        hidden = (x.flatten(1)[:, None] * self.inner.to(x)).sum(2).tanh()
        return (hidden[:, None] * self.outer.to(x)).sum(2)


def run(attack, model=None, x=X, goal=GOAL, threat=THREAT, rng=RNG):
    return attack(model or Net(), x, goal, threat, rng=rng)


class Told(OracleWrapper):
    """Passes a question on; notes in which order and with which dice it was asked."""

    def __init__(self, inner, technique):
        super().__init__(inner)
        self.technique, self.calls = technique, 0

    def gradient(self, rows, x, members=None, weights=None):
        self.calls += 1
        self.technique.notes.append((self.technique.word, self.calls, rows.rng.stream, rows.rng.step))
        first = self.inner.gradient(split_rng(rows, self.technique.word, 0), x, members, weights)
        second = self.inner.gradient(split_rng(rows, self.technique.word, 1), x, members, weights)
        return (first + second) / 2


@dataclass(frozen=True)
class Telling(Technique):
    """Asks twice for one, notes who asks, and puts itself around the surrogates."""

    word: str
    notes: list[Any]
    info = Info("technique", "telling")

    def prepare(self, surrogates):
        self.notes.append(("prepare", self.word))
        return surrogates

    def wrap(self, inner):
        self.notes.append(("wrap", self.word, type(inner).__name__))
        return Told(inner, self)


# The loop.


@rules
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_every_rule_takes_all_its_steps_and_ends_in_the_ball(name, norm):
    threat = ThreatModel.parse({"linf": "linf:1/16", "l2": "l2:1/2"}[norm])
    for dtype in (torch.float32, torch.float64):
        x = X.to(dtype)
        net = Net()
        with torch.no_grad():
            fooled = Goal(GOAL.labels).reached(net(x))
        assert fooled.any()
        net.queries.clear()
        found = compose([make(name)])(net, x, Goal(GOAL.labels), threat, rng=RNG)
        assert threat.contains(found, x).all()
        assert found.dtype == dtype
        # All rows, all steps, fooled or not, and not one look more.
        assert len(net.queries) % make(name).steps == 0
        assert set(net.queries) == {(4, True)}
        assert (found != x).flatten(1).any(1).all()


@rules
def test_the_result_of_a_row_is_independent_of_the_batch(name):
    attack = compose([make(name)])
    whole = run(attack)
    for order in ([2, 0, 3, 1], [3], [1, 2]):
        index = torch.tensor(order)
        part = run(attack, x=X[index], goal=GOAL.select(index), rng=RNG.select(index))
        assert torch.equal(part, whole[index])


@pytest.mark.parametrize("goal", [GOAL, Goal(GOAL.labels)])
def test_the_last_successful_restart_is_returned(goal):
    """As in section A.3 of the posterior attack: the surrogates say which, and without any the first stays."""
    threat = ThreatModel.parse("linf:1/4")
    attack = compose([make("pgd", steps=3, restarts=4, step_size="0.1eps")])
    assert attack.gradients == 12
    once = compose([make("pgd", steps=3, step_size="0.1eps")])
    tries = [once(Net(), X, goal, threat, rng=RNG.at(restart=restart)) for restart in range(4)]
    reached = torch.stack([goal.reached(Net()(found)) for found in tries])
    net = Net()
    found = run(attack, net, goal=goal, threat=threat)
    assert len([gradient for _, gradient in net.queries if gradient]) == 12
    kept = []
    for row in range(4):
        hits = [0, *[restart for restart in range(1, 4) if reached[restart, row]]]
        kept.append(hits[-1])
        assert torch.equal(found[row], tries[hits[-1]][row])
    assert len(set(kept)) > 1  # else the test would not tell one restart from another


@rules
def test_an_empty_batch_is_accepted(name):
    empty = torch.arange(0)
    assert run(compose([make(name)]), x=X[empty], goal=GOAL.select(empty), rng=RNG.select(empty)).shape[0] == 0


@rules
def test_rows_without_gradient_stay_at_the_start_of_the_rule(name):
    def flat(x):
        live = (x > 0).flatten(1).all(1)[:, None]
        return torch.where(live, Net()(x), torch.zeros_like(x.flatten(1)[:, :3]) + 0 * x.sum())

    x = X.clone()
    x[1] = 0.0
    rest = make(name, random_start=False) if name == "pgd" else make(name)
    found = compose([rest])(flat, x, GOAL, THREAT, rng=RNG)
    assert torch.equal(found[1], x[1])
    assert found.isfinite().all()
    assert (found[0] != x[0]).any()


def test_each_step_has_its_own_random_draws():
    notes: list[Any] = []
    run(Composition(make("mi-fgsm", steps=3), (Telling("a", notes),)))
    assert [note[3] for note in notes if note[0] == "a"] == [1, 2, 3]


@dataclass(frozen=True)
class Ahead:
    """A rule that looks elsewhere than where it stands."""

    steps: int = 3
    loss: str = "ce"

    def init(self, rows):
        return {"x": rows.x + 9, "point": rows.x}

    def step(self, rows, state, answer):
        return {"x": state["x"] + 9, "point": state["point"] + 0.001}


def test_the_result_is_the_point_and_not_the_next_query():
    found = ascend(Ahead(), Net(), X, GOAL, THREAT, RNG)
    torch.testing.assert_close(found, X + 0.003, rtol=0, atol=1e-12)
    found = ascend(Ahead(steps=100), Net(), X, GOAL, THREAT, RNG)
    assert torch.equal(found, THREAT.project(X + 0.1, X))


def test_an_attack_changes_no_state_of_the_caller():
    x = X.clone().requires_grad_()
    found = run(compose([make("mi-fgsm")]), x=x)
    assert not found.requires_grad
    assert x.grad is None
    assert torch.equal(x.detach(), X)
    with torch.no_grad():
        assert torch.equal(run(compose([make("mi-fgsm")])), found)


# Techniques.


def test_the_leftmost_technique_is_the_outermost():
    notes: list[Any] = []
    net = Net()
    attack = Composition(make("i-fgsm", steps=2), (Telling("a", notes), Telling("b", notes)))
    run(attack, net)
    assert notes[:4] == [
        ("prepare", "a"),
        ("prepare", "b"),
        ("wrap", "b", "SurrogateOracle"),
        ("wrap", "a", "Told"),
    ]
    events = [note[0] for note in notes[4:]]
    assert events == ["a", "b", "b"] * 2
    assert net.queries == [(4, True)] * 8  # 2 steps, 2 questions of each, 2 of each of these


def test_an_oracle_keeps_state_for_one_run_only():
    notes: list[Any] = []
    attack = Composition(make("i-fgsm", steps=3), (Telling("a", notes),))
    run(attack)
    run(attack)
    assert [note[1] for note in notes if note[0] == "a"] == [1, 2, 3, 1, 2, 3]


def test_a_rules_own_loop_uses_the_techniques():
    """CWA's inner loop, of 1 + 2 questions a step, asks the technique for each."""
    notes: list[Any] = []
    net = Net()
    run(Composition(make("cwa", steps=2), (Telling("a", notes),)), Surrogates([net, net]))
    streams = [note[2] for note in notes if note[0] == "a"]
    assert streams == ["transfer/sam0", "transfer/cse0", "transfer/cse1"] * 2
    assert len(net.queries) == 2 * 2 * (2 + 1 + 1)


def test_queries_of_one_step_have_their_own_random_draws():
    rows = Rows(X, GOAL, THREAT, RNG.at(step=3), GOAL)
    streams = [
        split_rng(rows, "a"),
        split_rng(rows, "a", 1),
        split_rng(rows, "b"),
        split_rng(split_rng(rows, "a"), "a"),
        rows,
    ]
    draws = [one.rng.uniform(5) for one in streams]
    for number, draw in enumerate(draws):
        assert all(not torch.equal(draw, other) for other in draws[:number])
    assert torch.equal(draws[0], split_rng(rows, "a", 0).rng.uniform(5))
    # Each row's, whatever stands beside it.
    index = torch.tensor([2])
    assert torch.equal(split_rng(rows.select(index), "b").rng.uniform(5), draws[2][index])
    assert split_rng(rows, "a").rng.step == 3


def test_the_innermost_oracle_is_the_surrogates_gradient_of_the_aim():
    nets = Surrogates([Net(1), Net(2)])
    assert GOAL.targets is not None
    other = Goal(GOAL.targets)
    rows = Rows(X, GOAL, THREAT, RNG, other)
    oracle = SurrogateOracle(nets, "margin")
    assert oracle.surrogates is nets
    assert Told(oracle, None).surrogates is nets
    found = oracle.gradient(rows, X, [1], torch.tensor([2.0]))
    assert torch.equal(found, nets.gradient(X, other, "margin", RNG, [1], torch.tensor([2.0])))


# Composed by name.


def test_compose_refuses_attacks_that_are_no_rule():
    with pytest.raises(UsageError) as error:
        compose([make("apgd"), Telling("a", [])])
    assert str(error.value) == "apgd takes no techniques: use an ascent rule before '+', e.g. mi-fgsm+telling."
    apgd = make("apgd")
    assert compose([apgd]) is apgd
    assert "apgd" not in RULES
    assert {"fgsm", "i-fgsm", "mi-fgsm", "ni-fgsm", "pgd", "cwa", "mi-sam", "mi-cse"} <= set(RULES)


def test_a_composition_has_a_name_and_a_spec():
    attack = compose(parse_attack("cwa(steps=3,order=random)", "linf"))
    assert attack.name == "cwa"
    assert attack.info.ascent
    record = json.loads(json.dumps(attack.spec()))
    assert record.pop("techniques") == []
    assert make(**record) == attack.rule
    assert (record["steps"], record["order"]) == (3, "random")
    two = Composition(attack.rule, (Telling("a", []), Telling("b", [])))
    assert two.name == "cwa+telling+telling"
    assert [part["word"] for part in two.spec()["techniques"]] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mi-fgsm", {"name": "mi-fgsm", "steps": 10}),
        (" mi-fgsm( steps = 4 , step_size=1/2 ) ", {"steps": 4, "step_size": 0.5}),
        ("apgd(steps=3)", {"name": "apgd", "steps": 3}),
        ("adam-cwa", {"name": "cwa", "update": "adam"}),
        ("foolbox:LinfPGD(steps=3)", {"name": "foolbox:LinfPGD", "steps": 3}),
    ],
)
def test_attack_strings(text, expected):
    (value,) = parse_attack(text, "linf")
    record = registry.spec(value)
    assert {field: record[field] for field in expected} == expected


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("mi-fgms", "no attack or recipe 'mi-fgms'. Did you mean 'mi-fgsm'?"),
        ("cw", "no attack or recipe 'cw'. Did you mean 'cwa'?"),
        ("adam-cwq", "no attack or recipe 'adam-cwq'. Did you mean 'adam-cwa'?"),
        ("mi-fgsm+nothinglikeit", "no technique 'nothinglikeit'."),
        ("mi-fgsm(stesp=3)", "no field of mi-fgsm 'stesp'. Did you mean 'steps'?"),
        ("mi-fgsm(steps=0)", "mi-fgsm: steps=0 must be at least 1."),
        ("mi-fgsm(steps=ten)", "mi-fgsm: steps='ten' must be a whole number from 1 to 1000000."),
        (
            "adam-cwa(steps=3)",
            "recipe 'adam-cwa' takes no fields; write the attack that it names: 'cwa(update=adam)'.",
        ),
        ("autoattack", "no attack or recipe 'autoattack'."),
        *((text, f"attack {text!r}: write NAME") for text in ("", " ", "mi-fgsm+", "+mi-fgsm", "mi-fgsm++cwa")),
        ("mi-fgsm(3)", "attack 'mi-fgsm(3)': '3' is not field=value."),
        ("mi-fgsm(steps=3,steps=4)", "attack 'mi-fgsm(steps=3,steps=4)': field 'steps' is given twice."),
    ],
)
def test_bad_attack_strings_are_one_sentence(text, sentence):
    with pytest.raises(UsageError) as error:
        parse_attack(text, "linf")
    assert str(error.value).startswith(sentence)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["di", "vmi(copies=3)+di"])
def test_a_technique_without_a_rule_is_refused(text):
    with pytest.raises(UsageError, match=f"write e.g. mi-fgsm[+]{re.escape(text)}"):
        parse_attack(text, "linf")


@pytest.mark.parametrize(
    "text",
    [
        *("mi-fgsm(step_size=-0.1)", "mi-fgsm(step_size=-2/255px)", "cwa(beta=-1)", "cwa(reverse=-1/15)"),
        *("mi-fgsm(momentum=-1)", "pgn(radius=-1)", "rap(step_size=-1eps)"),
    ],
)
def test_negative_fields_are_refused(text):
    whole = text if text.startswith(("mi", "cwa")) else f"mi-fgsm+{text}"
    with pytest.raises(UsageError, match=r"must (not be negative|be (at least|from|above) 0)"):
        parse_attack(whole, "linf")


def test_an_attack_outside_its_norms_is_refused():
    with pytest.raises(UsageError) as error:
        parse_attack("cwa", "l1")
    assert str(error.value) == "cwa is not defined in l1; it works in linf, l2."


@pytest.mark.parametrize("kind", ["technique", "recipe"])
def test_techniques_and_recipes_are_named_after_their_file(kind):
    """A recipe may end in the stem as well as begin with it: SSA-CWA is what its paper calls `cwa+ssa`."""
    for name, entry in catalog(kind).items():
        stem = entry.module.rpartition(".")[2].replace("_", "-")
        assert name == stem or name.startswith(f"{stem}-") or (kind == "recipe" and name.endswith(f"-{stem}")), (
            name
        )
        assert find(kind, name).info == entry.info
        assert entry.summary.endswith((".", "`."))


def test_every_rule_reads_the_gradient_only():
    """An answer without logits and loss is enough, which is what lets techniques stand between."""
    for name in RULES:
        rule = make(name)
        rows = Rows(X, GOAL, THREAT, RNG, GOAL)
        state = rule.init(rows)
        oracle = SurrogateOracle(Surrogates([Net()]), rule.loss)
        oracle = rule.wrap(oracle) if hasattr(rule, "wrap") else oracle
        gradient = oracle.gradient(replace(rows, rng=RNG.at(step=1)), state["x"])
        assert rule.step(rows, state, SimpleNamespace(gradient=gradient))["x"].shape == X.shape


@pytest.mark.parametrize("attack", ["i-fgsm(steps=3)", "mi-fgsm(steps=3)+svre", "cwa(steps=2)"])
def test_the_bounds_of_linf_are_computed_once(attack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    threat, calls, interval = ThreatModel.parse("linf:8/255"), [], Linf._interval

    def counted(x: torch.Tensor, radii: torch.Tensor) -> Any:
        calls.append(x)
        return interval(x, radii)

    monkeypatch.setattr(Linf, "_interval", staticmethod(counted))
    nets = Surrogates((lambda x: x.flatten(1), lambda x: x.flatten(1).square()))
    x, goal = torch.full((2, 1, 1, 3), 0.5), Goal(torch.tensor([0, 1]))
    composed = compose(parse_attack(attack, "linf"))
    assert threat.contains(composed(nets, x, goal, threat, rng=RowRng(0, "test", torch.arange(2))), x).all()
    assert len(calls) == 1
