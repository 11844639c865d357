"""How an option is declared, and how its value is checked. Imports no torch."""

from __future__ import annotations

import math
import numbers
import operator
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from robustkit.core.errors import UsageError, expand_path
from robustkit.core.limits import MAX_STATED_LIMIT, Limits
from robustkit.core.numbers import shown, whole

T = TypeVar("T")
R = TypeVar("R")

PATH, NUMBERS, SUITE = "str | Path", "Sequence[float]", "Suite"
# What a value must be, by the annotation of its field. Other values are checked where they are used.
EXPECTED = {
    "bool": "True or False",
    "int": "a whole number",
    "float": "a number",
    "str": "a string",
    PATH: "a path, as a string or a Path",
    "Path": "a path",
    NUMBERS: "a list of numbers",
    SUITE: "a string, an attack, or a list of them",
}
KEY = "option"


@dataclass(frozen=True)
class Option:
    """What is known of an option beside its name, type and default.

    Attributes:
        help: for the command line and for Python.
        more: sentences that follow in Python's documentation only.
        limits: the range of a number.
        expected: what the value must be, where the annotation does not say it well.
        metavar: the placeholder of the value on the command line.
        shown_default: how the command line shows the default, if not as Python does; `{verb}` is the verb's name.
        read: from the text of the command line to the value; raises ValueError that says what the text must be.
        flags: the flags on the command line, if not `--name`.
        positional: whether the command line takes it as an argument.
    """

    help: str
    more: str = ""
    limits: Limits | None = None
    expected: str = ""
    metavar: str = ""
    shown_default: str = ""
    read: Callable[[str], Any] | None = None
    flags: str = ""
    positional: bool = False


def option(default: T, help: str, limits: Limits | None = None, **further: Any) -> T:
    """Declare a field with a default; `further` are the other attributes of `Option`."""
    return field(default=default, metadata=about(help, limits=limits, **further))


def about(help: str, **further: Any) -> dict[str, Option]:
    """Return the metadata of a field without a default: `field(metadata=about("…"))`."""
    return {KEY: Option(help, **further)}


@dataclass(frozen=True)
class Options:
    """Base of the options of a verb: values are checked as they are set.

    Attributes:
        section: under which heading the command line lists the fields that a class declares.
        examples: commands that lead the help page.
    """

    section: ClassVar[str] = "Options"
    examples: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, section: str | None = None) -> None:
        """Note the section of a class's own fields."""
        if section is not None:
            cls.section = section

    def __post_init__(self) -> None:
        """Replace each value by its plain int, float, str or Path; UsageError for one that is none."""
        for declared in fields(self):
            value = checked(declared, getattr(self, declared.name), declared.name)
            object.__setattr__(self, declared.name, value)


def described(declared: Field[Any]) -> Option:
    """Return the description of a field of a verb's options."""
    option: Option = declared.metadata[KEY]
    return option


def checked(declared: Field[Any], value: Any, name: str) -> Any:
    """Return a value as a plain int, float, str or Path where that is what its field's annotation says.

    Args:
        declared: the field.
        value: what was given.
        name: of the option, as the caller spells it: `batch_size` or `--batch-size`.

    Raises:
        UsageError: the value has another type, such as the string `'64'` for a whole number, is not finite or is
            out of range.
    """
    kind, optional, _ = str(declared.type).partition(" | None")
    if optional and value is None:
        return None
    about = described(declared)
    if kind in EXPECTED:
        value = _plain(name, value, kind, about.expected or EXPECTED[kind])
    if kind == "float" and not math.isfinite(value):
        raise UsageError(f"{name} must be a finite number, got {value}.")
    if about.limits is not None and (fault := about.limits.fault(value)):
        given = f"{value:g}" if kind == "float" else shown(value)
        raise UsageError(f"{name} must be {about.expected or fault}, got {given}.")
    return value


def _plain(name: str, value: Any, kind: str, expected: str) -> Any:
    if type(value).__name__ == kind:
        return value
    if kind in (PATH, "Path"):
        if isinstance(value, (str, os.PathLike)) and str(value).strip():
            return _path(name, value)
    elif kind == NUMBERS:
        if isinstance(value, Iterable) and all(isinstance(number, numbers.Real) for number in value):
            return value
    elif kind == SUITE:
        if isinstance(value, Sequence) or callable(value):
            return value
    elif not isinstance(value, bool):
        if kind == "int" and hasattr(value, "__index__"):
            return operator.index(value)
        if kind == "float" and isinstance(value, numbers.Real):
            return float(value)
        if kind == "str" and isinstance(value, str):
            return str(value)
    simple = value is None or isinstance(value, (str, bool, numbers.Number))
    raise UsageError(f"{name} must be {expected}, got {shown(value) if simple else f'a {type(value).__name__}'}.")


def _path(name: str, value: str | os.PathLike[str]) -> Any:
    """Return a path with its ~ replaced; UsageError where no file can have the name or it cannot be reached."""
    path = expand_path(value)
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise UsageError(f"{name} is {str(path)!r}, which cannot be used: {error.strerror}.") from error
    return path


def from_text(declared: Field[Any], text: Any, name: str) -> Any:
    """Return the value of a text on the command line, or of several texts.

    Args:
        declared: the field.
        text: what the user typed; True or False for a flag without a value.
        name: of the flag, such as `--batch-size`.

    Raises:
        UsageError: the text is no such value.
    """
    kind = str(declared.type).removesuffix(" | None")
    about = described(declared)
    if kind == "Sequence[Path]":
        return tuple(_path(name, part) for part in text)
    if kind == "Sequence[str]":
        return tuple(text)
    readers: dict[str, Callable[[str], Any]] = {"int": whole, "float": float}
    read = about.read or readers.get(kind)
    if read is None:
        return checked(declared, text, name)
    try:
        value = read(text)
    except ValueError as error:
        expected = error if about.read else EXPECTED[kind]
        raise UsageError(f"{name} must be {expected}, got {shown(text)}.") from None
    return checked(declared, value, name)


def build(request: type[R], options: Options, **others: Any) -> R:
    """Create an engine's request from the options that have the names of its fields, and from other values.

    Args:
        request: a dataclass.
        options: of a verb; those that are no fields of the request are left out.
        others: fields that are no options, or that are not passed as they are.
    """
    names = {one.name for one in fields(request)}  # type: ignore[arg-type]
    same = {one.name: getattr(options, one.name) for one in fields(options) if one.name in names}
    return request(**same | others)


def range_text(limits: Limits) -> str:
    """Return a range for help texts, without an upper end that only guards against typing errors."""
    return str(
        limits
        if limits.high < MAX_STATED_LIMIT
        else Limits(limits.low, open="low" if limits.open == "low" else "")
    )
