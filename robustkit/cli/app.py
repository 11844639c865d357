"""The verbs and their flags."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="robustkit",
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

DEFAULT_MODEL = "robustkit:digits-cnn"

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")]
DataRoot = Annotated[
    Path | None, typer.Option(help="Where downloaded data sets are [default: ~/.cache/robustkit/data].")
]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"robustkit {installed('robustkit')}")
        raise typer.Exit


@app.command()
def evaluate(
    model: Annotated[
        str, typer.Argument(help="ARCH[@WEIGHTS][?mean=r,g,b&std=r,g,b&size=N&num_classes=K]")
    ] = DEFAULT_MODEL,
    data: Annotated[
        str | None, typer.Option(help="NAME[:SPLIT], folder:PATH or FILE.npz [default: digits:test]")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N images.")] = None,
    threat: Annotated[
        str | None, typer.Option(help="NORM:EPS, e.g. linf:8/255, l2:0.5 [default: the data's usual one]")
    ] = None,
    suite: Annotated[
        str,
        typer.Option(help="Attacks: a suite's name, or a list such as 'pgd(steps=50),autoattack:square'."),
    ] = "autoattack",
    seed: Annotated[int, typer.Option(min=0, help="Of every random number.")] = 0,
    device: Device = "auto",
    precision: Annotated[str, typer.Option(help="Of the search: auto, fp32, bf16, fp16.")] = "auto",
    batch_size: Annotated[
        str, typer.Option(help="Images that an attack gets at once; memory cuts further by itself.")
    ] = "auto",
    out: Annotated[Path | None, typer.Option(help="Run folder [default: runs/evaluate-ID].")] = None,
    data_root: DataRoot = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch the data set if it is absent.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print report.json instead of the table.")] = False,
    debug: Debug = False,
) -> int:
    """Attack a model; print and store how much of its accuracy stands. The same command resumes.

    \b
    robustkit evaluate
    robustkit evaluate robustkit:cifar-resnet20@resnet20.safetensors --data test.npz --threat linf:8/255

    Without a model: the built-in one on the first images of scikit-learn's digits.
    """
    from robustkit.cli.evaluate import evaluate as work

    return work(
        model=model,
        data=data,
        limit=limit,
        threat=threat,
        suite=suite,
        seed=seed,
        device=device,
        precision=precision,
        batch_size=batch_size,
        out=out,
        data_root=data_root,
        download=download,
        as_json=json,
    )


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A finished run's folder.")],
    model: Annotated[str | None, typer.Option(help="Where the model is now, if it has moved.")] = None,
    data: Annotated[str | None, typer.Option(help="Where the data is now, if it has moved.")] = None,
    device: Device = "auto",
    data_root: DataRoot = None,
    debug: Debug = False,
) -> int:
    """Check every record of a run again: hashes, ball and box, and that the model is fooled.

    Exit code 1 if a record is bad. Borderline ones, within float noise, are listed apart.

    \b
    robustkit verify runs/evaluate-3f9c21ab
    """
    from robustkit.cli.verify import verify as work

    return work(folder, model=model, data=data, device=device, data_root=data_root)


@app.command("list")
def list_(
    what: Annotated[
        str | None, typer.Argument(metavar="[attacks|defenses|suites|models|data]", help="One of them.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """List what can be named: attacks, defenses, suites, models, data."""
    from robustkit.cli.listing import show

    return show(what, json)
