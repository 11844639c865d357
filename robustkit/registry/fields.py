"""Fields of registered classes: converted to their types and checked against their ranges when one is created.

Imports no torch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from robustkit.core.errors import UsageError
from robustkit.core.limits import Limits
from robustkit.core.numbers import exact, shown, whole
from robustkit.core.step_size import StepSize, check_bare

WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a word",
    StepSize: "a number with a unit, such as 0.25eps or 2/255px,",
}


def hyphenated(name: str, where: str) -> None:
    """Refuse a name with an underscore, so that users need not guess between `random-signs` and `random_signs`.

    Args:
        name: of an attack, technique, recipe, suite, defense, method, model source or data source.
        where: what declares it, for the message.

    Raises:
        UsageError: it has one.
    """
    if "_" in name:
        raise UsageError(
            f"{where} declares the name {name!r}: write {name.replace('_', '-')!r}; names have hyphens."
        )


def checked(cls: Any, name: str) -> None:
    """Make a frozen dataclass convert and check its fields by their annotated types.

    Args:
        cls: the class; its fields may be given as text, too.
        name: its name in messages.
    """
    made: Callable[..., None] = cls.__init__
    names = [field.name for field in dataclasses.fields(cls) if field.init]

    @functools.wraps(made)
    def __init__(self: Any, *args: Any, **more: Any) -> None:
        given = dict(zip(names, args, strict=False)) | more
        hints = field_types(cls)
        values = {
            key: convert(name, key, value, hints[key]) if key in hints else value for key, value in given.items()
        }
        _check_step(cls, name, given, values)
        made(self, *args[len(names) :], **values)

    cls.__init__ = __init__


@functools.cache
def field_types(cls: Any) -> Mapping[str, Any]:
    """Return the annotated types of a dataclass's fields, ranges included."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def range_of(wanted: Any) -> Limits | None:
    """Return the range that an annotated type has, if any."""
    kinds = get_args(wanted) if get_origin(wanted) in (Union, UnionType) else (wanted,)
    ranges = [note for kind in kinds for note in getattr(kind, "__metadata__", ()) if isinstance(note, Limits)]
    return ranges[0] if ranges else None


def takes(cls: Any, field: str) -> str:
    """Return in words which values a field of a registered dataclass takes."""
    return described(field_types(cls)[field]).rstrip(",")


def described(wanted: Any) -> str:
    """Return in words which values a field of this type takes."""
    kinds, limits = plain_types(wanted), range_of(wanted)
    words = " or ".join(WORDS[kind] for kind in kinds if kind is not type(None))
    return words + (f" {limits}" if limits else "") + (" or none" if type(None) in kinds else "")


def convert(name: str, field: str, value: Any, wanted: Any) -> Any:
    """Convert a field's value to its annotated type.

    Raises:
        UsageError: if it is of another type or outside the type's range.
    """
    kinds, limits = plain_types(wanted), range_of(wanted)
    if type(None) in kinds and (value is None or (isinstance(value, str) and value.lower() in ("none", "null"))):
        return None
    for kind in kinds:
        try:
            converted = _READ[kind](value) if kind in _READ else _instance(kind, value)
        except (ValueError, OverflowError) as error:
            if isinstance(error, UsageError):
                raise UsageError(f"{name}: {error}") from None
            continue
        if limits and (words := limits.fault(converted)):
            text = value.strip() if isinstance(value, str) else shown(value)
            raise UsageError(f"{name}: {field}={text} must be {words}.")
        return converted
    raise UsageError(f"{name}: {field}={shown(value)} must be {described(wanted)}.")


def plain_types(wanted: Any) -> tuple[Any, ...]:
    """Return the types of a union, or the one type, without ranges."""
    kinds = get_args(wanted) if get_origin(wanted) in (Union, UnionType) else (wanted,)
    return tuple(get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in kinds)


def _flag(value: Any) -> bool:
    if str(value).lower() not in ("true", "false"):
        raise ValueError("is neither true nor false")
    return str(value).lower() == "true"


def _instance(kind: Any, value: Any) -> Any:
    if not isinstance(value, get_origin(kind) or kind):
        raise ValueError("is of another type")
    return value


_READ: dict[Any, Callable[[Any], Any]] = {
    int: whole,
    float: lambda value: float(exact(value)),
    bool: _flag,
    StepSize: StepSize.read,
}


def _check_step(cls: Any, name: str, given: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Refuse a bare step size that was more likely meant in pixel units."""
    if values.get("step_size") is None or StepSize not in plain_types(field_types(cls)["step_size"]):
        return
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    check_bare(name, given["step_size"], values.get("steps", defaults.get("steps")))
