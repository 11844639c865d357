"""What all commands have in common: the sections of the help page, and a stdout that holds only results."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from typer.core import TyperCommand, TyperGroup

from robustkit.cli.streams import results_apart
from robustkit.core.errors import UsageError

# The order of the sections on help pages.
SECTIONS = ("Input", "Method", "Training", "Attack", "Forecast", "Compute", "Output", "Options")


class Command(TyperCommand):
    """A verb; what its work prints goes to stderr, and only its result to stdout.

    Attributes:
        sections: under which heading the help page lists each option, by the option's name.
    """

    sections: Mapping[str, str] = {}

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then the options section by section."""
        listed: dict[str, list[tuple[str, str]]] = {"Arguments": [], **{name: [] for name in SECTIONS}}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                section = self.sections.get(str(parameter.name), "Options")
                listed["Arguments" if parameter.param_type_name == "argument" else section].append(record)
        for section, records in listed.items():
            if records:
                with formatter.section(section):
                    formatter.write_dl(records)

    def invoke(self, ctx: Any) -> Any:
        """Do the work of the verb."""
        with results_apart():
            return super().invoke(ctx)


class LazyGroup(TyperGroup):
    """A group whose commands are made when they are called, and not to list them."""

    def summaries(self) -> Mapping[str, str]:
        """Return what each command does, by its name, in the order of the help page."""
        raise NotImplementedError

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the commands."""
        return list(self.summaries())

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the first sentence of each summary, cut to a line."""
        summaries = self.summaries()
        width = formatter.width - 6 - max(map(len, summaries))
        rows = []
        for name, text in summaries.items():
            sentence = text.split(". ")[0].rstrip(".") + "."
            rows.append((name, textwrap.shorten(sentence, width, placeholder="...")))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def check_words(words: Sequence[str]) -> None:
    """Refuse what is no value of any option or argument: an empty or blank text, a NUL character."""
    for before, word in zip(["", *words], words, strict=False):
        option, given, value = word.partition("=") if word.startswith("--") else (before, "=", word)
        name = option if option.startswith("-") else "an argument"
        if given and not value.strip():
            raise UsageError(f"{name} is {value!r}; set a value, or leave it out.")
        if "\0" in word:
            raise UsageError(f"{name} is {word!r}, which has a NUL character; remove it.")
