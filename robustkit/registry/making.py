"""Things made of their names and fields, which may be text, and records of them that make them again."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping
from fractions import Fraction
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from robustkit.errors import UsageError, did_you_mean
from robustkit.registry.entries import catalog, find

# Fields that count something and start at 1.
COUNTS = (
    *("steps", "restarts", "queries", "targets", "eot_iter", "probe", "finalists", "patience"),
    *("copies", "scales", "mixes", "blocks", "rounds", "kernel"),
    *("cycles", "samples"),
)
# Fields that are lengths, or shares of what was before: below 0 an attack would go backwards.
LENGTHS = ("step_size", "momentum", "inner_momentum", "beta", "beta_raw", "reverse", "radius", "sigma")


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


def _build(kind: str, name: str, fields: Mapping[str, Any]) -> Any:
    thing = find(kind, name)
    hints = get_type_hints(thing)
    types = {field.name: hints[field.name] for field in dataclasses.fields(thing)}
    for field in fields:
        if field not in types:
            raise did_you_mean(f"field of {name}", field, types)
    values = {field: convert(name, field, value, types[field]) for field, value in fields.items()}
    for field in COUNTS:
        if values.get(field) is not None and values[field] < 1:
            raise UsageError(f"{name}: {field}={values[field]} must be at least 1.")
    for field in () if kind == "method" else LENGTHS:
        if isinstance(values.get(field), float) and values[field] < 0:
            raise UsageError(f"{name}: {field}={values[field]:g} must not be negative.")
    return thing(**values)


def spec(value: Any) -> dict[str, Any]:
    """Return an attack as a record that `make(**record)` turns back into it; a defense as one like it."""
    fields = value.fields() if value.info.family else dataclasses.asdict(value)
    return {"name": getattr(value, "name", value.info.name), **fields}


def convert(name: str, field: str, value: Any, wanted: Any) -> Any:
    """Bring a field's value to its annotated type."""
    union = get_origin(wanted) in (Union, UnionType)
    kinds = get_args(wanted) if union else (wanted,)
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
        if type(None) in kinds:
            return None
    for kind in kinds:
        try:
            if kind is bool and str(value).lower() in ("true", "false"):
                return str(value).lower() == "true"
            if kind is int and not isinstance(value, bool) and int(value) == float(value):
                return int(value)
            if kind is float and not isinstance(value, bool):
                return float(Fraction(value) if isinstance(value, str) else value)
            if kind is str and isinstance(value, str):
                return value
        except (ValueError, TypeError, ArithmeticError):
            continue
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
    expected = " or ".join(words.get(kind, "none") for kind in kinds)
    raise UsageError(f"{name}: {field}={value!r} must be {expected}.")


def _literal(value: Any) -> Any:
    """Read a family member's field, whose types are another library's, as a Python literal if it is one."""
    try:
        return ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "none": None}.get(value.lower(), value)
