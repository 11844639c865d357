"""What every verb has in common: how its words are checked before any work, and where its prints go."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typer.core import TyperCommand

from robustkit.cli.streams import results_apart
from robustkit.core.errors import UsageError


class Command(TyperCommand):
    """A verb: its paths may begin with ~, its numbers are finite, and stdout holds nothing but its result."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the verb's words; UsageError for a path or a number that nothing can be done with."""
        rest: list[str] = super().parse_args(ctx, args)
        for parameter in self.params:
            given = ctx.params.get(parameter.name)
            name = parameter.opts[0] if parameter.opts[0].startswith("-") else str(parameter.make_metavar(ctx))
            if isinstance(given, float) and not math.isfinite(given):
                raise UsageError(f"{name} is {given}; write a finite number.")
            if given and parameter.type.name == "path":
                several = not isinstance(given, str)
                ctx.params[str(parameter.name)] = (
                    [_path(name, one) for one in given] if several else _path(name, given)
                )
        return rest

    def invoke(self, ctx: Any) -> Any:
        """Do the verb's work."""
        with results_apart():
            return super().invoke(ctx)


def check_words(words: Sequence[str]) -> None:
    """Refuse what no option and no argument can mean: nothing, blanks, a NUL character."""
    for before, word in zip(["", *words], words, strict=False):
        option, given, value = word.partition("=") if word.startswith("--") else (before, "=", word)
        name = option if option.startswith("-") else "an argument"
        if given and not value.strip():
            raise UsageError(f"{name} is {value!r}; write a value, or leave it out.")
        if "\0" in word:
            raise UsageError(f"{name} is {word!r}, with a NUL character in it; leave that out.")


def _path(name: str, text: str) -> str:
    """Return a path with its ~ replaced; UsageError where there is no such home, or no file can have the name."""
    try:
        path = str(Path(text).expanduser())
    except RuntimeError:
        raise UsageError(f"{name} is {text!r}, and there is no such user; write the folder itself.") from None
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise UsageError(f"{name} is {text!r}, which cannot be used: {error.strerror}.") from error
    return path
