"""Records as they are read: by the types of their fields, strictly, in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
from reports import make_report

from robustkit.core.errors import UsageError
from robustkit.core.limits import Limits
from robustkit.core.schema import Count, Keys, OneOf, build, parse
from robustkit.runs.evaluation_record import Report
from robustkit.runs.ledger import Chunk, Ledger, Verdict


@dataclass(frozen=True)
class Part:
    """A record within a record."""

    name: str
    size: Annotated[float, Limits(0, 1)] = 0.5


@dataclass(frozen=True)
class Whole:
    """One field of every kind."""

    count: Count
    parts: Sequence[Part]
    facts: Annotated[Mapping[str, Any], Keys(string=str, n=Count | None)]
    kind: Annotated[str, OneOf("a", "b")] = "a"
    share: float | None = None
    sure: bool = True


GOOD: dict[str, Any] = {"count": 3, "parts": [{"name": "x"}], "facts": {"string": "y", "more": [1]}}
DEEP: Any = 0
for _ in range(50):
    DEEP = [DEEP]


def test_what_is_right_is_built() -> None:
    made = build(Whole, {**GOOD, "share": 1, "kind": "b"}, "w.json")
    assert made == Whole(3, [Part("x")], {"string": "y", "more": [1]}, "b", 1)
    later = {**GOOD, "parts": [{"name": "x", "added": 1}], "added": {"in": "a later version"}}
    assert build(Whole, later, "w.json") == build(Whole, GOOD, "w.json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"count": "3"}, 'count is "3" but must be a whole number'),
        ({"count": True}, "count is true but must be a whole number"),
        ({"count": 3.0}, "count is 3.0 but must be a whole number"),
        ({"count": -1}, "count is -1 but must be at least 0"),
        ({"count": 10**30}, "but must be a whole number of at most 64 bits"),
        ({"count": None}, "count is null but must be a whole number"),
        ({"parts": {}}, "parts is {} but must be a list"),
        ({"parts": ["x"]}, 'parts[0] is "x" but must be an object'),
        ({"parts": [{"name": "x"}, {}]}, "parts[1].name is missing"),
        ({"parts": [{"name": "x", "size": 2}]}, "parts[0].size is 2 but must be from 0 to 1"),
        ({"facts": {}}, "facts.string is missing"),
        ({"facts": {"string": "y", "n": "z"}}, 'facts.n is "z" but must be a whole number'),
        ({"facts": {"string": "y", "deep": DEEP}}, "is nested too deeply"),
        ({"kind": "c"}, 'kind is "c" but must be "a" or "b"'),
        ({"share": "x" * 999}, "x… but must be a number"),
        ({"sure": 1}, "sure is 1 but must be true or false"),
    ],
)
def test_errors_name_what_is_wrong(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as error:
        build(Whole, {**GOOD, **change}, "w.json")
    assert str(error.value).startswith("w.json is damaged: ")
    assert words in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "Expecting property name"),
        ("", "Expecting value"),
        ('{"a": NaN}', "it says NaN"),
        ('{"a": -Infinity}', "it says -Infinity"),
        ('{"a": 1e999}', "the number 1e999 is too large"),
        ('{"a": 1, "b": 2, "a": 3}', "it says 'a' twice"),
        ("9" * 5000, "too many digits"),
        ("[" * 100_000, "nested too deeply"),
    ],
    ids=lambda text: text[:12],
)
def test_what_json_cannot_say(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=r"^w\.json cannot be read: ") as error:
        parse(text, "w.json")
    assert words in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body["robust_accuracy"].update(value=0.9, high=0.95),
        lambda body: body["clean_accuracy"].update(n=3),
        lambda body: body["verdicts"][1].update(index=0),
        lambda body: body["verdicts"][-1].update(index=10**6),
        lambda body: body["verdicts"][0].update(attack=None),
    ],
)
def test_a_report_that_contradicts_itself(change: Callable[[dict[str, Any]], None]) -> None:
    body = json.loads(json.dumps(make_report().to_json()))
    assert not list(Report.from_json(body).contradictions())
    change(body)
    assert list(Report.from_json(body).contradictions())


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE verdicts SET position = 7",
        "UPDATE verdicts SET position = -1",
        "UPDATE verdicts SET label = 'seven'",
        "UPDATE verdicts SET prediction = -2",
        "UPDATE verdicts SET margin = 'far'",
        "UPDATE verdicts SET fooled = 2",
        "UPDATE verdicts SET image = 'no hash'",
        "UPDATE verdicts SET adversarial = x'00'",
        "UPDATE verdicts SET adversarial = 'text'",
        'UPDATE verdicts SET "right" = 1.5',
        "UPDATE chunks SET stage = 9",
        "UPDATE chunks SET forwards = -1",
        "UPDATE chunks SET seconds = 'long'",
    ],
)
def test_ledger_rows_of_no_run(change: str) -> None:
    with Ledger.open(None, "run") as ledger:
        verdict = Verdict(0, 1, 2, -0.5, True, "ab" * 32, b"\0" * 8)
        ledger.write(Chunk(1, 0, 3, 2, 0.5, [verdict]))
        ledger.require(images=7, size=8, stages=1)
        ledger._db.execute(change)
        with pytest.raises(UsageError, match="is of no run of 7 images"):
            ledger.require(images=7, size=8, stages=1)
