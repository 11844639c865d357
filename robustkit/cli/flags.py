"""From a dataclass of options to a command: its flags, its help page, and the options that were typed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any, TypeVar

import typer

from robustkit.api.options.declare import Options, described, from_text, range_text
from robustkit.cli.command import Command

T = TypeVar("T", bound=Options)

LIST_TYPES = ("Sequence[str]", "Sequence[Path]")
PLACEHOLDERS = {"int": "N", "float": "NUMBER", "str": "TEXT"}
DEBUG = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def command(
    name: str,
    options: type[T],
    work: Callable[..., int],
    cls: type[Command] = Command,
    about: str = "",
    further: tuple[inspect.Parameter, ...] = (),
) -> Any:
    """Return the command of a verb, whose flags are the fields of its options.

    Args:
        name: the verb.
        options: its dataclass; each field becomes a flag or a positional argument.
        work: does the verb, and returns the exit code.
        cls: the class of the command.
        about: the text of the help page, instead of the docstring of `options` and its examples.
        further: flags that are no fields of `options`; `work` gets their texts as keywords.
    """
    declared = fields(options)

    def run(debug: bool, **texts: Any) -> int:
        others = {one.name: texts.pop(one.name) for one in further}
        return work(read(options, texts), **{key: text for key, text in others.items() if text is not None})

    parameters = [*further, *(_parameter(name, field) for field in declared)]
    parameters.append(inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=DEBUG))
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    app = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)
    settings = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
    app.command(name, cls=cls, help=about or help_page(options), context_settings=settings)(run)
    made: Any = typer.main.get_command(app)
    made.sections = {one.name: "Method" for one in further}
    made.sections |= {field.name: _section(options, field.name) for field in declared}
    return made


def help_page(options: type[Options]) -> str:
    """Return what a verb does, its examples, and what else there is to know."""
    summary, _, rest = inspect.cleandoc(options.__doc__ or "").partition("\n\n")
    # \b keeps the lines of the examples apart
    return "\n\n".join(filter(None, (summary, "\n".join(["\b", *options.examples]), rest)))


def read(options: type[T], texts: Mapping[str, Any]) -> T:
    """Return the options that were typed; those that were not have their defaults.

    Raises:
        UsageError: a text is no value of its option.
    """
    given = {}
    for field in fields(options):
        text = texts[field.name]
        if text is not None and text != []:
            given[field.name] = from_text(field, text, _flag(field))
    return options(**given)


def typed(options: Options, names: Collection[str]) -> list[str]:
    """Return the flags of a command line for those of the named fields that do not have their default values."""
    words: list[str] = []
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name in names and value != field.default:
            words += [_flag(field)] if value is True else [_flag(field), str(value)]
    return words


def _flag(field: Field[Any]) -> str:
    about = described(field)
    if about.positional:
        return about.metavar or field.name
    return about.flags.partition("/")[0] or f"--{field.name.replace('_', '-')}"


def _parameter(verb: str, field: Field[Any]) -> inspect.Parameter:
    kind, about = str(field.type).partition(" | ")[0], described(field)
    text = f"{about.help} {_default(field, verb)}".strip()
    hint: Any = bool if kind == "bool" else list[str] if str(field.type) in LIST_TYPES else str
    if about.positional:
        # click names an argument by its metavar
        described_as: Any = typer.Argument(help=text, metavar=about.metavar or None)
    else:
        metavar = about.metavar or (None if kind == "bool" else PLACEHOLDERS.get(kind, "TEXT"))
        described_as = typer.Option(about.flags or _flag(field), metavar=metavar, help=text, show_default=False)
    required = about.positional and field.default is MISSING
    annotation: Any = Annotated[hint if required else hint | None, described_as]
    default = inspect.Parameter.empty if required else None
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _default(field: Field[Any], verb: str) -> str:
    """Return the default and the range of an option for its help text."""
    about, default = described(field), ""
    if about.shown_default:
        default = about.shown_default.format(verb=verb)
    elif not any(field.default is none for none in (MISSING, None, False, ())):
        default = str(field.default)
    parts = [f"default: {default}"] * bool(default)
    parts += [range_text(about.limits)] if about.limits else []
    return f"[{'; '.join(parts)}]" if parts else ""


def _section(options: type[Options], name: str) -> str:
    """Return the section of the class that declared a field first."""
    owners = (one for one in reversed(options.__mro__) if name in vars(one).get("__annotations__", ()))
    return str(vars(next(owners)).get("section", "Options"))
