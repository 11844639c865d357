"""The commands under `robustkit train`: one for each method, with its fields as flags, read from its source."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from robustkit.cli.command import Command
from robustkit.registry import Entry, Field, catalog, describe


def methods(template: Callable[..., int]) -> type[TyperGroup]:
    """Return a group of commands whose flags are the template's and those of each method's fields.

    The template is called with the method's name, the fields given, and its own flags.
    """

    class Methods(TyperGroup):
        def list_commands(self, ctx: Any) -> list[str]:
            return sorted(catalog("method"))

        def get_command(self, ctx: Any, cmd_name: str) -> Any:
            return _command(template, describe("method", cmd_name))

    return Methods


def _command(template: Callable[..., int], entry: Entry) -> Any:
    names = [field.name for field in entry.fields]

    def work(**flags: Any) -> int:
        fields = {name: flags.pop(name) for name in names}
        return template(
            entry.reference or entry.info.name,
            {name: text for name, text in fields.items() if text is not None},
            **flags,
        )

    _, _, *rest = inspect.signature(template, eval_str=True).parameters.values()
    shared = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in rest]
    own = [_flag(field) for field in entry.fields]
    work.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
    work.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *shared)}
    paper = f" ({entry.info.paper})" if entry.info.paper else ""
    one = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)
    settings = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
    about = f"{entry.summary}{paper}\n\n{entry.detail}"
    one.command(entry.info.name, cls=Command, help=about, context_settings=settings)(work)
    return typer.main.get_command(one)


def _flag(field: Field) -> inspect.Parameter:
    about = typer.Option(
        f"--{field.name.replace('_', '-')}",
        metavar=field.type,
        help=f"{field.limits[:1].upper()}{field.limits[1:]}. [default: {field.default}]".removeprefix(". "),
    )
    hint = Annotated[str | None, about]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint)
