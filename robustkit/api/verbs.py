"""From a function of one options object to a Python function with explicit arguments."""

from __future__ import annotations

import functools
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import fields
from typing import ParamSpec, TypeVar

from robustkit.api.options.declare import Options, described, range_text
from robustkit.core.isolation import default_torch_modes

WIDTH = 110

P = ParamSpec("P")
A = TypeVar("A", bound=Options)
R = TypeVar("R")


def verb(arguments: Callable[P, A]) -> Callable[[Callable[[A], R]], Callable[P, R]]:
    """Return a decorator that gives a function the fields of `arguments` as its arguments.

    The decorated function checks its arguments (see `Options`), and runs with autograd on and inference mode and
    autocast off. Its signature and the `Args` of its documentation are those of the dataclass.

    Args:
        arguments: a dataclass of options, which the function takes as its only argument.
    """

    def decorate(function: Callable[[A], R]) -> Callable[P, R]:
        signature = inspect.signature(arguments)
        parameters = [one for one in signature.parameters.values()]

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{function.__name__}() {error}") from None
            given = arguments(*args, **kwargs)
            with default_torch_modes():
                return function(given)

        result = function.__annotations__.get("return", inspect.Signature.empty)
        call.__signature__ = signature.replace(return_annotation=result)  # type: ignore[attr-defined]
        call.__annotations__ = {one.name: one.annotation for one in parameters} | {"return": result}
        if function.__doc__ and isinstance(arguments, type):
            summary, separator, rest = inspect.cleandoc(function.__doc__).partition("\n\nReturns:")
            call.__doc__ = f"{summary}\n\n{arguments_section(arguments)}{separator}{rest}"
        return call

    return decorate


def arguments_section(arguments: type[Options]) -> str:
    """Return the `Args:` of a docstring from the declarations of the options."""
    lines = ["Args:"]
    for declared in sorted(fields(arguments), key=lambda one: bool(one.kw_only)):
        about = described(declared)
        bounds = f"Range: {range_text(about.limits)}." if about.limits else ""
        text = " ".join(filter(None, (f"{declared.name}: {about.help}", about.more, bounds)))
        lines += textwrap.wrap(text, WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 8)
    return "\n".join(lines)
