"""The table of the verbs. A verb's options and its work are imported when it is called."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any

import typer

from robustkit.cli.command import LazyGroup


@dataclass(frozen=True)
class Verb:
    """Where the parts of a verb are, each as `module:name`.

    Attributes:
        options: the dataclass of its flags, below `robustkit.api.options`.
        work: the function of these flags that does it and returns the exit code, below `robustkit.cli.verbs`.
        command: the class of its command, below `robustkit.cli`.
    """

    options: str
    work: str
    command: str = "command:Command"

    def load(self, name: str) -> Any:
        """Return the command."""
        from robustkit.cli.flags import command

        def work(options: Any) -> int:
            return int(_find("cli.verbs", self.work)(options))

        return command(name, _find("api.options", self.options), work, _find("cli", self.command))


VERBS = {
    "evaluate": Verb("evaluate:EvaluateFlags", "evaluate:evaluate", "gates:GatedCommand"),
    "plan": Verb("evaluate:PlanFlags", "plan:plan"),
    "craft": Verb("craft:CraftFlags", "craft:craft"),
    "transfer": Verb("craft:TransferFlags", "transfer:transfer"),
    "matrix": Verb("craft:MatrixFlags", "matrix:matrix"),
    "diversity": Verb("craft:DiversityFlags", "diversity:diversity"),
    "corrupt": Verb("corrupt:CorruptFlags", "corrupt:corrupt"),
    "train": Verb("train:TrainFlags", "train:train"),
    "verify": Verb("runs:VerifyFlags", "verify:verify"),
    "report": Verb("runs:ReportFlags", "report:report"),
    "compare": Verb("runs:CompareFlags", "compare:compare"),
    "export": Verb("runs:ExportFlags", "export:export"),
    "doctor": Verb("runs:DoctorFlags", "doctor:doctor"),
    "list": Verb("runs:ListFlags", "listing:show"),
}


class Verbs(LazyGroup):
    """The verbs as commands; `train` is a group with a command for each method."""

    def summaries(self) -> dict[str, str]:
        """Return the first paragraphs of the help pages."""
        texts = {name: str(_find("api.options", verb.options).__doc__) for name, verb in VERBS.items()}
        return {name: text.partition("\n")[0] for name, text in texts.items()}

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the command of a verb, None if there is no such verb."""
        if cmd_name == "train":
            return _find("cli.verbs", "train_methods:group")(cmd_name)
        return VERBS[cmd_name].load(cmd_name) if cmd_name in VERBS else None


app = typer.Typer(
    name="robustkit",
    cls=Verbs,
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="""Measure how robust a PyTorch image classifier really is.

    \b
    robustkit evaluate
    robustkit evaluate timm:resnet50.a1_in1k --data folder:val --limit 1000 --threat linf:4/255
    """,
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        from robustkit.version import __version__

        print(f"robustkit {__version__}")
        raise typer.Exit


def _find(package: str, reference: str) -> Any:
    module, _, name = reference.partition(":")
    return getattr(import_module(f"robustkit.{package}.{module}"), name)
