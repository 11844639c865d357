"""Things made of their names and fields, which may be text, and records of them that make them again."""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from robustkit.core.errors import UsageError, did_you_mean
from robustkit.core.numbers import LONGEST, shown
from robustkit.core.step_size import StepSize
from robustkit.registry.entries import catalog, find
from robustkit.registry.fields import field_types, plain_types


def make(name: str, **fields: Any) -> Any:
    """Return the attack `name` with these fields, converted from text to their types where needed.

    Raises:
        UsageError: for an unknown name or field, or a value of the wrong type.
    """
    head, _, tail = name.partition(":")
    entry = catalog("attack").get(head)
    if tail and entry and entry.info.family:
        return find("attack", head).member(tail, **{key: _literal(value) for key, value in fields.items()})
    if entry and entry.info.family:
        raise UsageError(f"attack {name!r} is a family; write {head}:NAME or {head}:NAME(field=value,...).")
    return _build("attack", name, fields)


def make_technique(name: str, **fields: Any) -> Any:
    """Return the technique `name` with these fields; see `make`."""
    return _build("technique", name, fields)


def make_method(name: str, **fields: Any) -> Any:
    """Return the method of training `name` with these fields; see `make`."""
    return _build("method", name, fields)


def make_again(kind: str, record: Mapping[str, Any]) -> Any:
    """Return what `spec` made a record of; a step size without a unit is there a share of eps, however small."""
    fields = {name: value for name, value in record.items() if name != "name"}
    size = fields.get("step_size")
    if (
        isinstance(size, (int, float))
        and not isinstance(size, bool)
        and StepSize in plain_types(field_types(find(kind, record["name"]))["step_size"])
    ):
        fields["step_size"] = StepSize(size)
    return make(record["name"], **fields) if kind == "attack" else _build(kind, record["name"], fields)


def _build(kind: str, name: str, fields: Mapping[str, Any]) -> Any:
    thing = find(kind, name)
    for field in fields:
        if field not in field_types(thing):
            raise did_you_mean(f"field of {name}", field, field_types(thing))
    return thing(**fields)


def spec(value: Any) -> dict[str, Any]:
    """Return an attack as a record that `make_again` turns back into it; a defense as one like it."""
    if value.info.family:
        fields = value.fields()
    else:
        fields = {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return {"name": getattr(value, "name", value.info.name), **fields}


def plain(value: Any) -> Any:
    """Return a field's value as JSON holds it."""
    return value.record if isinstance(value, StepSize) else value


def _literal(value: Any) -> Any:
    """Read a family member's field, whose types are another library's, as a Python literal if it is one."""
    if isinstance(value, str) and len(value) > LONGEST:
        raise UsageError(f"value {shown(value)} has more than {LONGEST} characters; write a shorter one.")
    try:
        return ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "none": None, "nan": math.nan, "inf": math.inf}.get(
            value.lower(), value
        )
