"""Changes of records: of a JSON value somewhere, of its text, of bytes."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

DEEP: Any = 1
for _ in range(60):
    DEEP = [DEEP]
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        -1,
        0,
        1,
        2,
        0.5,
        -0.5,
        1e308,
        -1e308,
        10**18,
        10**30,
        -(10**30),
        "",
        "x",
        "\0",
        "\udcff",
    ),
    *("\n", "nan", [], {}, [1], [None], ["x"], [[]], {"x": 1}, {"name": []}, {"": None}, "9" * 5000, DEEP),
)
# What only a text can say.
TEXTS = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "9" * 5000,
    "[" * 5000,
    '{"a": 1, "a": 2}',
    "",
    "]",
    "\ufeff",
    "tru",
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container with each of its keys or positions."""
    found: list[tuple[Any, Any]] = []
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found += [(value, key), *places(value[key])]
    return found


@st.composite
def changed(draw: st.DrawFn, text: str) -> str:
    """The text of a JSON record with up to two changes."""
    body = json.loads(text)
    for _ in range(draw(st.integers(1, 2))):
        if not (known := places(body)):
            break
        # Long lists are mostly alike: one of the first places as often as one of all.
        container, key = draw(st.one_of(st.sampled_from(known[:40]), st.sampled_from(known)))
        how = draw(st.sampled_from(("value", "value", "gone", "more", "swap", "text")))
        if how == "gone":
            del container[key]
        elif how == "more":
            body["surprise"] = copy.deepcopy(draw(st.sampled_from(VALUES)))
        elif how == "swap":
            other, there = draw(st.sampled_from(known))
            container[key] = (
                json.loads(json.dumps(other[there])) if there in other or isinstance(other, list) else 0
            )
        elif how == "text":
            container[key] = "MARK"
            return json.dumps(body).replace('"MARK"', draw(st.sampled_from(TEXTS)))
        else:
            container[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
    return json.dumps(body)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes with some flipped, cut off or put in."""
    body = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        position = draw(st.integers(0, max(len(body) - 1, 0)))
        how = draw(st.sampled_from(("flip", "flip", "flip", "cut", "more")))
        if how == "flip" and body:
            body[position] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del body[position:]
        else:
            body[position:position] = draw(st.binary(min_size=1, max_size=16))
    return bytes(body)
