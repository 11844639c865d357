"""Creates attacks, techniques, methods and defenses from names and fields; converts them to records and back."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import math
from collections.abc import Mapping
from typing import Any

from robustkit.core.errors import UsageError, did_you_mean
from robustkit.core.numbers import MAX_LENGTH, shown
from robustkit.core.step_size import StepSize
from robustkit.registry.code_files import code_of, is_reference
from robustkit.registry.decorators import ORIGIN
from robustkit.registry.entries import catalog, find
from robustkit.registry.fields import field_types, plain_types
from robustkit.registry.functions import FunctionAttack, is_plain_function
from robustkit.registry.plugins import plugins


def make(name: str, **fields: Any) -> Any:
    """Return the attack `name` with these fields, converted from text to their types where needed.

    Args:
        name: a registered name, `FAMILY:NAME` such as `foolbox:LinfPGD`, or `FILE.py:NAME`, whose file is run.
        fields: values, or their texts.

    Raises:
        UsageError: for an unknown name or field, or a value of the wrong type.
    """
    if not is_reference(name):
        head, _, tail = name.partition(":")
        entry = catalog("attack").get(head)
        if entry and entry.info.family and not entry.package:
            if tail:
                return find("attack", head).member(tail, **_literals(fields))
            raise UsageError(f"attack {name!r} is a family; write {head}:NAME or {head}:NAME(field=value,...).")
    return _build("attack", name, fields)


def make_technique(name: str, **fields: Any) -> Any:
    """Return the technique `name` with these fields; see `make`."""
    return _build("technique", name, fields)


def make_method(name: str, **fields: Any) -> Any:
    """Return the training method `name` with these fields; see `make`."""
    return _build("method", name, fields)


def from_record(kind: str, record: Mapping[str, Any], *, trust_code: bool = False) -> Any:
    """Return the object of a record by `spec`; a step size without a unit in it is a share of eps.

    Args:
        kind: `attack` or `method`.
        record: the record.
        trust_code: whether a file of Python that the record names may be run.

    Raises:
        UsageError: if the record names a file that is not trusted, or a package that is not installed.
    """
    fields = {name: value for name, value in record.items() if name not in ("name", *ORIGIN)}
    name = str(record.get("string", record["name"]))
    if is_reference(name) and not trust_code:
        raise UsageError(
            f"this record names Python code, {name!r}, which is not run because a file named it: give "
            "--trust-code (trust_code=True in Python) if you trust the author of that file."
        )
    if "package" in record and name not in catalog(kind):
        raise UsageError(f"{kind} {name!r} is of the package {record['package']}, which is not installed here.")
    size = fields.get("step_size")
    if (
        isinstance(size, (int, float))
        and not isinstance(size, bool)
        and StepSize in plain_types(field_types(find(kind, name))["step_size"])
    ):
        fields["step_size"] = StepSize(size)
    return make(name, **fields) if kind == "attack" else _build(kind, name, fields)


def _build(kind: str, name: str, fields: Mapping[str, Any]) -> Any:
    registered = find(kind, name)
    if is_plain_function(registered):
        return FunctionAttack(registered, _literals(fields))
    for field in fields:
        if field not in field_types(registered):
            raise did_you_mean(f"field of {name}", field, field_types(registered))
    return registered(**fields)


def as_attack(value: Any) -> Any:
    """Return the attack that a Python caller passed.

    Args:
        value: an attack; a class of attacks, which is made with its defaults; or a function
            `(model, x, y, eps) -> x_adv`.

    Raises:
        UsageError: if it is none of these.
    """
    if inspect.isclass(value) and _is_attack(value):
        return value()
    if _is_attack(value):
        return value
    if is_plain_function(value) and "threat" not in inspect.signature(value).parameters:
        return FunctionAttack(value)
    raise UsageError(
        f"{value!r:.80} is no attack: pass a name, an object of a class that is registered by @attack(...) of "
        "robustkit.registry, or a function (model, x, y, eps) -> x_adv."
    )


def _is_attack(value: Any) -> bool:
    return getattr(getattr(value, "info", None), "kind", None) == "attack"


def spec(value: Any) -> dict[str, Any]:
    """Return an attack, defense, technique or method as a record, which `from_record` converts back.

    It has the name, the fields, and the hash of the code if that is not robustkit's own (`code_of`).
    """
    if value.info.family:
        fields = value.fields()
    else:
        fields = {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return {"name": getattr(value, "name", value.info.name), **fields, **origin(value)}


def code_digests(record: Mapping[str, Any]) -> list[str]:
    """Return the hashes of code in a record and in the records inside it, such as those of techniques."""
    inside = [value for value in record.values() for value in (value if isinstance(value, list) else [value])]
    own = [str(record["code"])] if "code" in record else []
    return own + [digest for value in inside if isinstance(value, Mapping) for digest in code_digests(value)]


def origin(value: Any) -> dict[str, str]:
    """Return where the code of a registered object comes from, and its hash; empty for robustkit's own.

    `code` is a SHA-256; `package` the installed package that registers it, else `string` the `FILE.py:NAME` that
    it was loaded from.
    """
    code_object: Any = value.function if isinstance(value, FunctionAttack) else type(value)
    while isinstance(code_object, functools.partial):
        code_object = code_object.func
    if not inspect.isclass(code_object) and not inspect.isroutine(code_object):
        code_object = type(code_object)
    module = str(code_object.__module__)
    if module.partition(".")[0] != "robustkit":
        for group in ("attacks", "defenses"):
            for plugin in plugins(group).values():
                if plugin.module == module:
                    return plugin.record
    return code_of(code_object)


def plain(value: Any) -> Any:
    """Return a field's value as a JSON value."""
    return value.record if isinstance(value, StepSize) else value


def _literals(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _literal(value) for name, value in fields.items()}


def _literal(value: Any) -> Any:
    """Read a field of a family member, whose types belong to another library, as a Python literal if it is one."""
    if isinstance(value, str) and len(value) > MAX_LENGTH:
        raise UsageError(f"value {shown(value)} has more than {MAX_LENGTH} characters; write a shorter one.")
    try:
        return ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "none": None, "nan": math.nan, "inf": math.inf}.get(
            value.lower(), value
        )
