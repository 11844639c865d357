"""Numbers that users write: parsed exactly, and refused by their text before any fraction is built."""

from __future__ import annotations

import time
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustkit.core.errors import UsageError
from robustkit.core.numbers import exact, whole
from robustkit.core.threat import Linf, ThreatModel
from robustkit.registry import parse_attack, parse_defenses, parse_suite

# What neither a threat nor a field may be.
WRONG = (
    *("1e999999999", "-1e999999999", "1e-999999999", "1/1e999999999", "9" * 5000, "1/" + "9" * 5000, "1/0", "0/0"),
    *(
        "٣",
        "１",
        "1/٣",
        "nan",
        "inf",
        "-inf",
        "Infinity",
        "1_0",
        "0x1",
        "1/2/3",
        "",
        "/",
        "1/",
        "1,5",
        "1e",
        "--1",
    ),
)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("8/255", Fraction(8, 255)),
        ("0.3/255", Fraction(3, 2550)),
        ("1/0.5", Fraction(2)),
        (" 1e-2 ", Fraction(1, 100)),
        (".5", Fraction(1, 2)),
        ("5.", Fraction(5)),
        ("1e60", Fraction(10**60)),
        (0.1, Fraction(1, 10)),
        (np.float32(0.5), Fraction(1, 2)),
        (np.int64(3), Fraction(3)),
    ],
)
def test_numbers_are_read_exactly(text: Any, number: Fraction) -> None:
    assert exact(text) == number


@pytest.mark.parametrize(
    "text", [*WRONG, pytest.param(10**6000, id="huge"), float("nan"), float("inf"), True, None, [1], b"1", 5e-324]
)
def test_text_that_is_no_number_is_refused_immediately(text: Any) -> None:
    begun = time.perf_counter()
    with pytest.raises(ValueError, match=r"^(is|has|divides) "):
        exact(text)
    assert time.perf_counter() - begun < 5


@pytest.mark.parametrize("text", WRONG)
def test_threats_and_fields_refuse_the_same_numbers_in_a_sentence(text: str) -> None:
    for read in (
        lambda: ThreatModel.parse(f"linf:{text}"),
        lambda: parse_suite(f"pgd(step_size={text}px)", "linf"),
        lambda: parse_suite(f"pgd(density={text or '-'})", "l1"),
        lambda: parse_suite(f"square(queries={text or '-'})", "linf"),
        lambda: parse_attack(f"mi-fgsm+di(p={text or '-'})", "linf"),
        lambda: parse_defenses(f"smoothing:{text},3"),
    ):
        begun = time.perf_counter()
        with pytest.raises(UsageError) as error:
            read()
        assert time.perf_counter() - begun < 5
        assert len(str(error.value)) < 500
        assert str(error.value).endswith((".", "?"))


@given(st.fractions(0, 1, max_denominator=10**9))
def test_a_threat_is_read_again_as_it_is_written(eps: Fraction) -> None:
    assert ThreatModel.parse(str(Linf(eps))) == Linf(eps)


@pytest.mark.parametrize(
    "value", ["7.5", "1e3", "7.0", "٣", 7.5, True, pytest.param(10**6000, id="huge"), "1_0", float("nan")]
)
def test_what_is_no_whole_number_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^(is|has) "):
        whole(value)
    assert (whole("-7"), whole(7.0), whole(np.int32(7))) == (-7, 7, 7)
