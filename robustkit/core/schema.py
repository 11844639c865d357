"""Reading of records: from JSON text to dataclasses, checked by the types of their fields.

`Annotated[int, Limits(0)]` is an integer of at least 0, `Annotated[Mapping[str, Any], Keys(string=str)]` an
object with at least a text `string`. A dataclass checks conditions between its fields in its method `faults`.
Imports no torch.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from robustkit.core.errors import UsageError
from robustkit.core.limits import Limits

T = TypeVar("T")

# The format of every record, which this version writes and reads.
FORMAT = 1

# Integers of records fit into 64 bits, as SQLite's do. Values without a type can be nested to this depth.
MAX_INTEGER, MAX_DEPTH = 2**63 - 1, 32
REMEDY = "restore it from a copy, or run the command again with another --out folder."
WORDS = {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}


@dataclass(frozen=True, init=False, eq=False)
class Keys:
    """The types of an object's keys; it may have more keys. A key whose type has `| None` may be missing."""

    types: Mapping[str, Any]

    def __init__(self, **types: Any) -> None:
        """Set the type of each key."""
        object.__setattr__(self, "types", types)

    def fault(self, value: Any) -> str | None:
        """Check the values; raise `_Wrong` for an invalid one."""
        for name, kind in self.types.items():
            if name not in value and type(None) not in get_args(kind):
                raise _Wrong("is missing", f".{name}")
            try:
                _reader(kind)(value.get(name))
            except _Wrong as error:
                error.path.insert(0, f".{name}")
                raise
        return None


@dataclass(frozen=True)
class HasFieldsOf:
    """An object that has the fields of a dataclass but is not converted to it."""

    kind: Any

    def fault(self, value: Any) -> str | None:
        """Check the fields; raise `_Wrong` for an invalid one."""
        _reader(self.kind)(value)
        return None


@dataclass(frozen=True, init=False)
class OneOf:
    """One of some values."""

    values: tuple[Any, ...]

    def __init__(self, *values: Any) -> None:
        """Set the values."""
        object.__setattr__(self, "values", values)

    def fault(self, value: Any) -> str | None:
        """Return what the value must be, for a message; None if it is valid."""
        if any(value == one and type(value) is type(one) for one in self.values):
            return None
        return " or ".join(map(json.dumps, self.values))


Count = Annotated[int, Limits(0)]
Positive = Annotated[int, Limits(1)]
Share = Annotated[float, Limits(0, 1)]
Amount = Annotated[float, Limits(0)]


class _Wrong(ValueError):
    """What is wrong, with its path from the outermost record."""

    def __init__(self, what: str, *path: str) -> None:
        super().__init__(what)
        self.what, self.path = what, list(path)


def parse(text: str, name: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        UsageError: it is not valid JSON, or has NaN, infinity, a duplicate key, or a number that is too large.
    """
    try:
        return json.loads(text, parse_constant=_constant, parse_float=_float, object_pairs_hook=_once)
    except RecursionError:
        raise UsageError(f"{name} cannot be read: it is nested too deeply; {REMEDY}") from None
    except _Wrong as error:
        raise UsageError(f"{name} cannot be read: {error.what}; {REMEDY}") from None
    except json.JSONDecodeError as error:
        raise UsageError(f"{name} cannot be read: {error}; {REMEDY}") from error
    except ValueError:  # Python refuses to read more than some thousand digits
        raise UsageError(f"{name} cannot be read: a number in it has too many digits; {REMEDY}") from None


def build(kind: type[T], value: Any, name: str) -> T:
    """Return a dataclass from a parsed JSON value; see `checked`."""
    made: T = checked(kind, value, name)
    return made


def checked(kind: Any, value: Any, name: str) -> Any:
    """Return a parsed JSON value converted to a type: objects to dataclasses, the rest unchanged.

    Args:
        kind: the type.
        value: the parsed JSON.
        name: name of the value in errors, such as the path of the file.

    Raises:
        UsageError: a field is missing or not what its type says, or fields do not fit together.
    """
    try:
        return _reader(kind)(value)
    except _Wrong as error:
        path = "".join(error.path).lstrip(".")
        raise UsageError(f"{name} is damaged: {path or 'it'} {error.what}; {REMEDY}") from None


def _constant(text: str) -> float:
    raise _Wrong(f"it says {text}, which is no number in JSON")


def _float(text: str) -> float:
    if math.isinf(number := float(text)):
        raise _Wrong(f"the number {text} is too large")
    return number


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Wrong(f"it says {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


Reader = Callable[[Any], Any]


@cache
def _reader(kind: Any) -> Reader:
    """Return a function that checks a parsed value against a type and converts it."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _limited(_reader(parts[0]), parts[1:])
    if origin in (Union, types.UnionType):
        (inner,) = (part for part in parts if part is not type(None))
        read = _reader(inner)
        return lambda value: None if value is None else read(value)
    if is_dataclass(kind):
        return _record(kind)
    if origin is not None and issubclass(origin, Mapping):
        return _mapping(_reader(parts[1]))
    if origin is not None and issubclass(origin, Sequence):
        return _list(_reader(parts[0]))
    return _plain if kind is Any else _scalar(kind)


def _needed(value: Any, words: str) -> _Wrong:
    text = json.dumps(value)
    return _Wrong(f"is {text if len(text) <= 60 else text[:57] + '…'} but must be {words}")


def _limited(read: Reader, limits: Sequence[Any]) -> Reader:
    def work(value: Any) -> Any:
        value = read(value)
        for limit in limits:
            if value is not None and (words := limit.fault(value)):
                raise _needed(value, words)
        return value

    return work


def _scalar(kind: Any) -> Reader:
    known = (int, float) if kind is float else (kind,)

    def work(value: Any) -> Any:
        if type(value) not in known:
            raise _needed(value, WORDS[kind])
        if type(value) is int and abs(value) > MAX_INTEGER:
            raise _needed(value, "a whole number of at most 64 bits")
        return value

    return work


def _list(read: Reader) -> Reader:
    def work(value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            raise _needed(value, "a list")
        found: list[Any] = []
        try:
            for one in value:
                found.append(read(one))
        except _Wrong as error:
            error.path.insert(0, f"[{len(found)}]")
            raise
        return found

    return work


def _mapping(read: Reader) -> Reader:
    def work(value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise _needed(value, "an object")
        found = {}
        for name, one in value.items():
            try:
                found[name] = read(one)
            except _Wrong as error:
                error.path.insert(0, f".{name}")
                raise
        return found

    return work


def _record(kind: Any) -> Reader:
    hints = get_type_hints(kind, include_extras=True)
    # Fields without repr exist in memory only, not in the file.
    known = [one for one in fields(kind) if one.repr]
    readers = {one.name: _reader(hints[one.name]) for one in known}
    needed = {one.name for one in known if one.default is MISSING and one.default_factory is MISSING}
    faults: Callable[[Any], Iterator[str]] | None = getattr(kind, "faults", None)

    def work(value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise _needed(value, "an object")
        if missing := needed - value.keys():
            raise _Wrong("is missing", f".{min(missing)}")
        found = {}
        for name, one in value.items():
            if name not in readers:  # of a later version, which may add keys to this format
                continue
            try:
                found[name] = readers[name](one)
            except _Wrong as error:
                error.path.insert(0, f".{name}")
                raise
        made = kind(**found)
        for fault in faults(made) if faults else ():
            raise _Wrong(fault)
        return made

    return work


def _plain(value: Any, depth: int = 0) -> Any:
    """Return a JSON value of limited depth; deeper values would exhaust Python's stack later."""
    if depth > MAX_DEPTH:
        raise _Wrong("is nested too deeply")
    if isinstance(value, Mapping):
        return {name: _plain(one, depth + 1) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one, depth + 1) for one in value]
    return _scalar(type(value))(value) if isinstance(value, int) else value


def check_format(body: Any, name: str) -> None:
    """Refuse a record of another format, or without a format."""
    if not isinstance(body, Mapping) or body.get("format") != FORMAT:
        found = body.get("format") if isinstance(body, Mapping) else type(body).__name__
        raise UsageError(f"{name} has format {found!r}; this version of robustkit reads {FORMAT}.")
