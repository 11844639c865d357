"""The arguments of the verbs, as people write them in Python."""

from __future__ import annotations

import functools
import inspect
import numbers
import operator
import os
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

from robustkit.core.errors import UsageError, possible
from robustkit.core.isolation import usual_torch

P = ParamSpec("P")
T = TypeVar("T")

# What an annotation asks for, in words.
PATH, NUMBERS = "str | Path", "Sequence[float]"
WORDS = {
    "bool": "True or False",
    "int": "a whole number",
    "float": "a number",
    "str": "a string",
    PATH: "a path, as a string or a Path",
    NUMBERS: "a list of numbers",
}
# A net in the place of its string is refused with advice of its own.
APART = ("arch",)


def verb(function: Callable[P, T]) -> Callable[P, T]:
    """Check a verb's plain arguments by their annotations, and run it under torch's usual switches."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{function.__name__}() {error}") from None
        for name, value in bound.arguments.items():
            if name not in APART:
                bound.arguments[name] = plain(name, value, str(signature.parameters[name].annotation))
        with usual_torch():
            return function(*bound.args, **bound.kwargs)

    return call


def plain(name: str, value: Any, kind: str) -> Any:
    """Return an argument as a plain int, float, str or Path where that is what its annotation asks for.

    Raises:
        UsageError: if it is something else, such as the string `'64'` for a whole number.
    """
    kind, optional, _ = kind.partition(" | None")
    if kind not in WORDS or type(value).__name__ == kind or (optional and value is None):
        return value
    if kind == PATH:
        if isinstance(value, (str, os.PathLike)) and str(value).strip():
            return possible(value)
    elif kind == NUMBERS:
        if isinstance(value, Iterable) and all(isinstance(number, numbers.Real) for number in value):
            return value
    elif not isinstance(value, bool):
        if kind == "int" and hasattr(value, "__index__"):
            return operator.index(value)
        if kind == "float" and isinstance(value, numbers.Real):
            return float(value)
        if kind == "str" and isinstance(value, str):
            return str(value)
    shown = value is None or isinstance(value, (str, bool, numbers.Number))
    given = repr(value) if shown else f"a {type(value).__name__}"
    raise UsageError(f"{name} must be {WORDS[kind]}, got {given}.")
