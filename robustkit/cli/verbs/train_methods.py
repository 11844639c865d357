"""The commands below `robustkit train`: one per method, with its fields as flags, read from its source text."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer

from robustkit.api.options.train import TrainFlags
from robustkit.cli.command import LazyGroup
from robustkit.cli.flags import command, help_page
from robustkit.registry import Entry, Field, catalog, describe


class Methods(LazyGroup):
    """The methods as commands."""

    def summaries(self) -> dict[str, str]:
        """Return the summaries of the methods."""
        return {name: entry.summary for name, entry in sorted(catalog("method").items())}

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the command of a method."""
        return _command(describe("method", cmd_name))


def group(name: str) -> Any:
    """Return the command `train`."""
    app = typer.Typer(
        name=name,
        cls=Methods,
        no_args_is_help=True,
        rich_markup_mode=None,
        add_completion=False,
        subcommand_metavar="METHOD [OPTIONS]",
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
        help=help_page(TrainFlags),
    )
    app.callback()(lambda: None)
    return typer.main.get_command(app)


def _command(entry: Entry) -> Any:
    def work(flags: TrainFlags, **fields: str) -> int:
        from robustkit.cli.verbs.train import train

        return train(flags, entry.reference or entry.info.name, fields)

    paper = f" ({entry.info.paper})" if entry.info.paper else ""
    about = f"{entry.summary}{paper}\n\n{entry.detail}"
    further = tuple(_flag(field) for field in entry.fields)
    return command(entry.info.name, TrainFlags, work, about=about, further=further)


def _flag(field: Field) -> inspect.Parameter:
    about = typer.Option(
        f"--{field.name.replace('_', '-')}",
        metavar=field.type,
        help=f"{field.limits[:1].upper()}{field.limits[1:]}. [default: {field.default}]".removeprefix(". "),
    )
    hint = Annotated[str | None, about]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint)
