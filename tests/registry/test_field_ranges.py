"""Every field of everything that is registered has a type and a range, checked however it is made."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from robustkit import registry
from robustkit.attacks.gradient.pgd import PGD
from robustkit.core.errors import UsageError
from robustkit.core.limits import Limits
from robustkit.defenses.transforms.smoothing import Smoothing
from robustkit.registry.fields import described, field_types, plain_types, range_of
from robustkit.registry.ranges import NAMED

THINGS = [
    (kind, name)
    for kind in ("attack", "technique", "method", "defense")
    for name, entry in sorted(registry.catalog(kind).items())
    if not entry.info.family
]
# Margins, which may be any number.
ANY_NUMBER = {("triage", "safe"), ("triage", "hope")}


def numeric(wanted: Any) -> bool:
    return bool({int, float} & set(plain_types(wanted)))


@pytest.mark.parametrize(("kind", "name"), THINGS)
def test_every_number_has_a_range_that_its_default_is_in(kind: str, name: str) -> None:
    thing = registry.find(kind, name)
    for field in dataclasses.fields(thing):
        wanted = field_types(thing)[field.name]
        if not numeric(wanted):
            continue
        limits = range_of(wanted)
        assert limits or (name, field.name) in ANY_NUMBER, field.name
        assert field.default is None or limits is None or field.default in limits
        assert str(limits or "") in described(wanted)


@pytest.mark.parametrize(("kind", "name"), THINGS)
def test_what_no_field_may_be_is_refused_in_one_sentence(kind: str, name: str) -> None:
    """From text and from Python, by name and by place: nonsense stops before anything is made."""
    thing = registry.find(kind, name)
    for place, field in enumerate(dataclasses.fields(thing)):
        wanted = field_types(thing)[field.name]
        if not numeric(wanted):
            continue
        limits = range_of(wanted) or Limits(-math.inf)
        beyond: list[Any] = [end for end in (limits.low - 1, limits.high + 1) if math.isfinite(end)]
        ends = {"low": [limits.low], "high": [limits.high], "both": [limits.low, limits.high]}
        if int in plain_types(wanted):
            beyond += [0.5, "0.5", "1e0"]
        wrong = ["nan", "inf", "many", "", "1/0", "٣", True, math.nan, math.inf, [1], 10**5000]
        for value in (*beyond, *ends.get(limits.open, []), *wrong, *map(str, beyond)):
            for make in (
                lambda value=value, field=field: thing(**{field.name: value}),
                lambda value=value, place=place: thing(
                    *(one.default for one in dataclasses.fields(thing)[:place]), value
                ),
            ):
                with pytest.raises(UsageError) as error:
                    make()
                message = str(error.value)
                assert message.startswith(f"{name}: {field.name}="), message
                assert message.endswith(".")
                assert len(message) < 400


def test_values_are_brought_to_their_types_in_python_too() -> None:
    from_text: Any = PGD
    made = from_text("7", restarts=np.int64(2), density=np.float32(0.5), random_start="false")
    assert (made.steps, made.restarts, made.density, made.random_start) == (7, 2, 0.5, False)
    from_text = Smoothing
    assert from_text("1/4", "3") == Smoothing(0.25, 3)
    assert dataclasses.replace(made, steps="8").steps == 8


def test_messages_state_the_range() -> None:
    for text, sentence in {
        "pgd(steps=0)": "pgd: steps=0 must be at least 1.",
        "pgd(density=-1)": "pgd: density=-1 must be from 0 to 1.",
        "square(p_init=2)": "square: p_init=2 must be above 0 and at most 1.",
        "apgd(rho=0)": "apgd: rho=0 must be above 0 and at most 1.",
        "apgd-t(targets=-3)": "apgd-t: targets=-3 must be at least 1.",
        "mi-fgsm(momentum=2)": "mi-fgsm: momentum=2 must be from 0 to 1.",
        "pgd(steps=1000001)": "pgd: steps=1000001 must be at most 1000000.",
        "pgd(steps=2.5)": "pgd: steps='2.5' must be a whole number from 1 to 1000000.",
    }.items():
        with pytest.raises(UsageError) as error:
            registry.parse_suite(text, "linf")
        assert str(error.value) == sentence


def test_limits_read_from_source_text_are_those_in_force() -> None:
    """Help pages read annotations without importing; they must say what the constructor checks."""
    for kind, name in THINGS:
        thing = registry.find(kind, name)
        for field in registry.catalog(kind)[name].fields:
            limits = range_of(field_types(thing)[field.name])
            if limits:
                assert field.limits == str(limits), (name, field.name)
            assert not any(word in field.type for word in (*NAMED, "Annotated"))
