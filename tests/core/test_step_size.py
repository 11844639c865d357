"""Step sizes carry their unit; bare numbers that are more likely pixels are refused."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from robustkit import registry
from robustkit.attack_api import Rows
from robustkit.attacks.gradient.pgd import PGD
from robustkit.attacks.transfer.mi_fgsm import MIFGSM
from robustkit.attacks.transfer.techniques.svre import SVRE
from robustkit.core.criteria import Goal
from robustkit.core.errors import UsageError
from robustkit.core.rng import RowRng
from robustkit.core.step_size import StepSize
from robustkit.core.threat import ThreatModel
from robustkit.defenses.adversarial_training.pgd_at import PGDAT
from robustkit.registry import from_record, make, make_method, parse_attack, parse_suite, spec

SHAPE = (5, 3, 7, 9)
RULES = ("pgd", "i-fgsm", "mi-fgsm", "ni-fgsm", "cwa", "mi-cse")
STEPPED = sorted(
    {
        (kind, name)
        for kind in ("attack", "technique", "method")
        for name, entry in registry.catalog(kind).items()
        if any(field.name == "step_size" for field in entry.fields)
    }
)


@pytest.mark.parametrize(
    ("text", "length", "written"),
    [
        ("2/255px", 2 / 255, "2/255px"),
        ("0.00784px", 0.00784, "0.00784px"),
        (" 0.3/255 PX ", 0.3 / 255, "1/850px"),
        ("0.25eps", 0.025, "0.25eps"),
        ("1/7eps", 0.1 / 7, "1/7eps"),
        ("1", 0.1, "1eps"),
        (0.5, 0.05, "0.5eps"),
    ],
)
def test_a_step_has_a_length_at_every_eps(text: Any, length: float, written: str) -> None:
    size = StepSize.read(text)
    assert size.length(0.1) == pytest.approx(length, rel=1e-12)
    assert size.share(0.1) == pytest.approx(length / 0.1, rel=1e-12)
    assert str(size) == written
    assert StepSize.read(str(size)) == size


@pytest.mark.parametrize(
    ("rule", "norm"),
    [(rule, norm) for rule in RULES for norm in registry.catalog("attack")[rule].info.norms],
)
def test_a_step_in_pixels_goes_as_far_as_it_says(rule: str, norm: str) -> None:
    x, threat = torch.full(SHAPE, 0.5, dtype=torch.float64), ThreatModel.parse(f"{norm}:0.2")
    weight = torch.linspace(-1, 1, x[0].numel(), dtype=torch.float64)

    def model(images: torch.Tensor) -> torch.Tensor:
        # The label wins whatever happens, so that no attack stops.
        return torch.stack([9 + images.flatten(1) @ weight, torch.zeros(len(images), dtype=torch.float64)], 1)

    still = {"random_start": False} if rule == "pgd" else {}
    attack = make(rule, steps=1, step_size="0.05px", **still)
    moved = attack(model, x, Goal(torch.zeros(5, dtype=torch.int64)), threat, rng=RowRng(0, "a", torch.arange(5)))
    torch.testing.assert_close(threat.distance(moved, x), torch.full((5,), 0.05).double(), rtol=1e-6, atol=0)


def test_pgd_takes_two_and_a_half_times_eps_over_its_steps() -> None:
    goal = Goal(torch.zeros(5, dtype=torch.int64))
    rows = Rows(torch.full(SHAPE, 0.5), goal, ThreatModel.parse("linf:0.1"), RowRng(0, "a", torch.arange(5)), goal)
    upwards: Any = SimpleNamespace(gradient=torch.ones(SHAPE))
    for steps in (5, 10, 40):
        moved = PGD(steps=steps).step(rows, {"x": rows.x}, upwards)["x"]
        assert float(moved.max()) - 0.5 == pytest.approx(0.25 / steps, abs=1e-6)
        # The papers' eps / steps.
        state = {"x": rows.x, "velocity": torch.zeros(SHAPE)}
        moved = MIFGSM(steps=steps).step(rows, state, upwards)["x"]
        assert float(moved.max()) - 0.5 == pytest.approx(0.1 / steps, abs=1e-6)


@pytest.mark.parametrize("bare", ["2/255", "0.00784", 2 / 255, "8/255", "0.3/255", "1/256", "2", 16])
def test_bare_pixels_are_refused(bare: Any) -> None:
    makers = [lambda: make("pgd", steps=10, step_size=bare), lambda: make_method("pgd-at", step_size=bare)]
    makers += [lambda: PGD(steps=10, step_size=bare), lambda: PGDAT(steps=10, step_size=bare)]
    if isinstance(bare, str):
        makers += [lambda: parse_suite(f"pgd(steps=10,step_size={bare})", "linf")]
        makers += [lambda: parse_attack(f"mi-fgsm(steps=10,step_size={bare})+di", "linf")]
    for maker in makers:
        with pytest.raises(UsageError, match=r"has no unit.*write step_size=\S+px for .*, or \S+eps for"):
            maker()


def test_a_bare_share_that_reaches_the_edge_stays_one() -> None:
    assert make("pgd", steps=10, step_size="0.25").step_size == StepSize(0.25)
    assert spec(make("pgd", steps=10, step_size=0.1))["step_size"] == 0.1
    with pytest.raises(UsageError, match=r"3 steps of it reach 0\.3 of eps"):
        make("mi-fgsm", steps=3, step_size=0.1)
    with pytest.raises(UsageError, match=r"svre: step_size=2/255 has no unit"):
        SVRE(step_size=cast(Any, "2/255"))


@pytest.mark.parametrize("bare", ["2/255", "2/255.0", "2/ 255", 1 / 255, 2 / 255, 3 / 255])
def test_bare_levels_are_refused_however_many_steps_there_are(bare: Any) -> None:
    with pytest.raises(UsageError, match=r"write step_size=\S+.*px for pixel units of \[0, 1\]"):
        PGD(steps=1000, step_size=bare)


@pytest.mark.parametrize("share", [1 / 3, 1 / 5, 1 / 15, 1 / 17, 0.01, 0.004, 0.25, 1.5, "1/10"])
def test_shares_that_are_no_levels_stay_shares(share: Any) -> None:
    assert PGD(steps=1000, step_size=share).step_size is not None


def test_levels_without_their_255_are_refused_where_pixels_go_to_1() -> None:
    for text in ("pgd(step_size=2px)", "mi-fgsm(step_size=2px)", "multires-prior(step_size=1.5px)"):
        for read in (parse_suite, parse_attack):
            with pytest.raises(UsageError, match=r"longer than the range .* write step_size=\S+/255px if 8-bit"):
                read(text, "linf")
    assert parse_suite("pgd(step_size=2px)", "l1")
    assert parse_suite("pgd(step_size=1px)", "linf")


@pytest.mark.parametrize(("kind", "name"), STEPPED)
def test_everything_that_steps_takes_both_units_and_has_a_record(kind: str, name: str) -> None:
    for text, share in (("0.5eps", 0.5), ("2/255px", 2 / 255 / 0.1)):
        if name == "fmn" and text.endswith("eps"):
            with pytest.raises(UsageError, match="must be an l2 length in pixel units"):
                make(name, step_size=text)
            continue
        made = registry.find(kind, name)(step_size=text)
        assert made.step_size.share(0.1) == pytest.approx(share)
        record = json.loads(json.dumps(spec(made)))
        assert record["step_size"] == (0.5 if text == "0.5eps" else text)
        assert from_record(kind, record) == made
        assert replace(made, **{fields(made)[0].name: getattr(made, fields(made)[0].name)}) == made


def test_old_records_hold_shares_of_eps_however_small() -> None:
    """A bare number that is refused from a person was written by robustkit itself."""
    old = {"name": "pgd", "steps": 1, "step_size": 0.01, "restarts": 1, "loss": "ce", "random_start": True}
    made = from_record("attack", old)
    assert made.step_size == StepSize(0.01)
    assert spec(made) == {**old, "density": 0.01}
    assert spec(from_record("method", {"name": "pgd-at", "step_size": 0.01}))["step_size"] == 0.01


@pytest.mark.parametrize(
    "wrong", ["px", "eps", "1pixels", "-1px", "0px", "0eps", "-0.1", "nanpx", "1/0px", "1e999999999eps", True, [1]]
)
def test_invalid_step_sizes_are_one_sentence(wrong: Any) -> None:
    with pytest.raises(UsageError) as error:
        make("pgd", step_size=wrong)
    assert str(error.value).startswith("pgd: step_size=")
    assert str(error.value).endswith(".")
