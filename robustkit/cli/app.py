"""The verbs and their flags."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from robustkit.cli.command import Command
from robustkit.cli.gates import GatedCommand
from robustkit.cli.verbs.train_methods import methods
from robustkit.registry import DEFAULT_SUITE

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

verb = partial(app.command, cls=Command)

DEFAULT_MODEL = "robustkit:digits-cnn"

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")]
Strictness = Annotated[
    str | None,
    typer.Option(
        metavar="SHARE",
        help="Go on until at most this share of the images, e.g. '0.05 %', could still fall to AutoAttack, "
        "by a 95 % bound; 0 gives every image every attack [default: 0.2 %, or one image]",
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, metavar="N", help="Of every random number.")]
DataRoot = Annotated[
    Path | None, typer.Option(help="Where downloaded data sets are [default: ~/.cache/robustkit/data].")
]

TrustCode = Annotated[
    bool,
    typer.Option("--trust-code", help="Run Python code that a file names (a run folder's record, a list), too."),
]

Workers = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, max=1024, help="Processes that share the work; same results. [default: 1]"),
]
Ray = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="Have the workers on a Ray cluster: auto, HOST:PORT or local."),
]

Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Remove the run that the folder of --out holds; begin anew.")
]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        from robustkit.version import __version__

        print(f"robustkit {__version__}")
        raise typer.Exit


@verb(cls=GatedCommand)
def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(
            help=f"ARCH[@WEIGHTS][?mean=r,g,b&std=r,g,b&size=N&num_classes=K&defense=D] [default: {DEFAULT_MODEL}]"
        ),
    ] = None,
    models: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Evaluate every model of a list, and rank them: [NAME=]MODEL a line."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="NAME[:SPLIT], folder:PATH, webdataset:PATH or FILE.npz [default: digits:test]"),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N images.")] = None,
    threat: Annotated[
        str | None,
        typer.Option(
            help="NORM:EPS, e.g. linf:8/255, l2:0.5; NORM:curve is its usual eps with --curve; NORM:min looks for "
            "each image's smallest distance [default: the data's usual one]"
        ),
    ] = None,
    suite: Annotated[
        str,
        typer.Option(help="Attacks: a suite's name, or a list such as 'pgd(steps=50),autoattack:square'."),
    ] = DEFAULT_SUITE,
    seed: Seed = 0,
    device: Device = "auto",
    precision: Annotated[str, typer.Option(help="Of the search: auto, fp32, bf16, fp16.")] = "auto",
    batch_size: Annotated[
        str, typer.Option(help="Images that an attack gets at once; memory cuts further by itself.")
    ] = "auto",
    curve: Annotated[
        bool, typer.Option("--curve", help="Search for each image's smallest fooling eps as well.")
    ] = False,
    audit: Annotated[
        int, typer.Option(metavar="N", min=0, help="Run full AutoAttack on N random survivors as well.")
    ] = 0,
    strictness: Strictness = None,
    time_limit: Annotated[
        str | None, typer.Option(metavar="TIME", help="Stop after e.g. 90s, 10m, 2h: images in random order.")
    ] = None,
    stop_at_width: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Stop once the 95 % interval is no wider, e.g. 0.02.")
    ] = None,
    workers: Workers = None,
    ray: Ray = None,
    out: Annotated[Path | None, typer.Option(help="Run folder [default: runs/evaluate-ID].")] = None,
    overwrite: Overwrite = False,
    data_root: DataRoot = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch the data set if it is absent.")] = False,
    no_html: Annotated[bool, typer.Option("--no-html", help="Write no report.html into the folder.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print report.json instead of the table.")] = False,
    fail_under: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Exit with 1 if robust accuracy is below, e.g. 0.45.")
    ] = None,
    trust_code: TrustCode = False,
    confident: Annotated[
        bool, typer.Option("--confident", help="Let --fail-under compare the lower end of the 95 % interval.")
    ] = False,
    fail_on_flag: Annotated[
        list[str] | None,
        typer.Option(metavar="[CODE]", help="Exit with 1 if a flag warns, or if this one is raised."),
    ] = None,
    debug: Debug = False,
) -> int:
    """Attack a model; print and store how much of its accuracy stands. The same command resumes.

    \b
    robustkit evaluate
    robustkit evaluate robustkit:cifar-resnet20@resnet20.safetensors --data test.npz --threat linf:8/255
    robustkit evaluate --models zoo.txt --data test.npz --threat linf:8/255 --workers 4

    Without a model: the built-in one on the first images of scikit-learn's digits.
    """
    from robustkit.cli.verbs.evaluate import evaluate as work

    return work(
        model=model,
        models=models,
        data=data,
        limit=limit,
        threat=threat,
        suite=suite,
        seed=seed,
        device=device,
        precision=precision,
        batch_size=batch_size,
        curve=curve,
        audit=audit,
        strictness=strictness,
        time_limit=time_limit,
        stop_at_width=stop_at_width,
        workers=workers,
        ray=ray,
        out=out,
        overwrite=overwrite,
        data_root=data_root,
        download=download,
        trust_code=trust_code,
        with_page=not no_html,
        as_json=json,
        fail_under=fail_under,
        confident=confident,
        fail_on_flag=fail_on_flag or (),
    )


@verb()
def plan(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="ARCH[@WEIGHTS][?mean=r,g,b&std=r,g,b&size=N&num_classes=K&defense=D]")
    ] = DEFAULT_MODEL,
    data: Annotated[
        str | None, typer.Option(help="NAME[:SPLIT], folder:PATH or FILE.npz [default: digits:test]")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N images.")] = None,
    threat: Annotated[
        str | None,
        typer.Option(help="NORM:EPS or NORM:min, e.g. linf:8/255, l2:0.5 [default: the data's usual one]"),
    ] = None,
    suite: Annotated[
        str,
        typer.Option(help="Attacks: a suite's name, or a list such as 'pgd(steps=50),autoattack:square'."),
    ] = DEFAULT_SUITE,
    seed: Seed = 0,
    device: Device = "auto",
    precision: Annotated[str, typer.Option(help="Of the search: auto, fp32, bf16, fp16.")] = "auto",
    batch_size: Annotated[
        str, typer.Option(help="Images that an attack gets at once; memory cuts further by itself.")
    ] = "auto",
    strictness: Strictness = None,
    seconds: Annotated[float, typer.Option(help="How long to attack; more makes the interval narrower.")] = 10.0,
    devices: Annotated[str, typer.Option(metavar="N,N,…", help="How many devices like this one.")] = "1,8,64",
    price: Annotated[
        float | None, typer.Option(metavar="MONEY", help="Of a device for an hour, to tell the cost.")
    ] = None,
    data_root: DataRoot = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch the data set if it is absent.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
    trust_code: TrustCode = False,
    debug: Debug = False,
) -> int:
    """Measure for some seconds what an evaluation will take, on one device and on several. Writes nothing.

    \b
    robustkit plan
    robustkit plan timm:resnet50.a1_in1k --data folder:val --threat linf:4/255 --devices 1,8,64 --price 2.5

    The first options are those of `robustkit evaluate`.
    """
    from robustkit.cli.verbs.plan import plan as work

    given: dict[str, object] = {"data": data, "limit": limit, "threat": threat, "suite": suite, "seed": seed}
    given |= {"device": device, "precision": precision, "batch_size": batch_size, "data_root": data_root}
    given |= {"strictness": strictness}
    flags = [] if model == DEFAULT_MODEL else [model]
    for name, value in given.items():
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            flags += [f"--{name.replace('_', '-')}", str(value)]
    if trust_code:
        flags.append("--trust-code")
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
        strictness=strictness,
        seconds=seconds,
        devices=devices,
        price=price,
        data_root=data_root,
        download=download,
        trust_code=trust_code,
        as_json=json,
        flags=flags,
    )


@verb()
def craft(
    surrogate: Annotated[
        list[str] | None,
        typer.Option(metavar="MODEL", help=f"Craft on it; give several. [default: {DEFAULT_MODEL}]"),
    ] = None,
    attack: Annotated[
        str, typer.Option(help="An attack with techniques, e.g. 'mi-fgsm(steps=20)+di'; see robustkit list.")
    ] = "auto",
    combine: Annotated[
        str, typer.Option(help="What is averaged: logits, probabilities, loss, gradients, consensus.")
    ] = "consensus",
    weights: Annotated[
        str | None, typer.Option(metavar="W,W,…", help="Of the surrogates, in order [default: all the same].")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(metavar="MODEL", help="Judge the images on it; give several.")
    ] = None,
    targeted: Annotated[
        str | None,
        typer.Option(metavar="CHOICE", help="Aim at a class: next, random or least-likely [default: any other]."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="NAME[:SPLIT], folder:PATH, webdataset:PATH or FILE.npz [default: digits:test]"),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N images.")] = None,
    threat: Annotated[
        str | None, typer.Option(help="NORM:EPS, e.g. linf:8/255 [default: the data's usual one]")
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    batch_size: Annotated[str, typer.Option(help="Images crafted at once.")] = "auto",
    streaming: Annotated[
        bool | None,
        typer.Option("--streaming/--held", help="One surrogate in memory at a time, or all [default: what fits]."),
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option(metavar="G,G,…", help="Success at other gradients per image as well, e.g. 10,40,100,400."),
    ] = None,
    forecast: Annotated[
        bool, typer.Option("--forecast", help="Leave each surrogate out in turn: what unseen models may expect.")
    ] = False,
    png: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write 8-bit files there that are within eps, too.")
    ] = None,
    workers: Workers = None,
    ray: Ray = None,
    out: Annotated[Path | None, typer.Option(help="Run folder [default: runs/craft-ID].")] = None,
    overwrite: Overwrite = False,
    data_root: DataRoot = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch the data set if it is absent.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print transfer.json instead of the table.")] = False,
    trust_code: TrustCode = False,
    debug: Debug = False,
) -> int:
    """Craft adversarial images on surrogates and judge them on models that they have not seen. Resumes.

    \b
    robustkit craft
    robustkit craft --surrogate timm:resnet50 --target timm:vit_base_patch16_224 --data folder:val --limit 500

    Success is over the images that a model classifies correctly. Without a surrogate: the built-in net.
    """
    from robustkit.cli.verbs.craft import craft as work

    return work(
        surrogates=surrogate or [DEFAULT_MODEL],
        attack=attack,
        combine=combine,
        weights=weights,
        targets=target or [],
        targeted=targeted,
        data=data,
        limit=limit,
        threat=threat,
        seed=seed,
        device=device,
        batch_size=batch_size,
        streaming=streaming,
        budgets=budgets,
        forecast=forecast,
        png=png,
        workers=workers,
        ray=ray,
        out=out,
        overwrite=overwrite,
        data_root=data_root,
        download=download,
        trust_code=trust_code,
        as_json=json,
    )


@verb()
def transfer(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A craft run's folder.")],
    target: Annotated[
        list[str] | None, typer.Option(metavar="MODEL", help="Judge the images on it; give several.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Where the data is now, if it has moved.")] = None,
    device: Device = "auto",
    data_root: DataRoot = None,
    json: Annotated[bool, typer.Option("--json", help="Print transfer.json instead of the table.")] = False,
    trust_code: TrustCode = False,
    debug: Debug = False,
) -> int:
    """Judge crafted images on more models, after checking every one; without a target: print the table again.

    \b
    robustkit transfer runs/craft-3f9c21ab --target timm:vit_base_patch16_224
    """
    from robustkit.cli.verbs.transfer import transfer as work

    return work(
        folder,
        targets=target or [],
        data=data,
        device=device,
        data_root=data_root,
        trust_code=trust_code,
        as_json=json,
    )


@verb()
def matrix(
    models: Annotated[
        list[str] | None, typer.Option(metavar="A,B,…", help="Craft on each, judge on all; also one at a time.")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(metavar="MODEL", help="Judge on it too, crafting nothing on it.")
    ] = None,
    attack: Annotated[str, typer.Option(help="An attack with techniques; see robustkit list.")] = "auto",
    targeted: Annotated[
        str | None,
        typer.Option(metavar="CHOICE", help="Aim at a class: next, random or least-likely [default: any other]."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="NAME[:SPLIT], folder:PATH, webdataset:PATH or FILE.npz.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N images.")] = None,
    threat: Annotated[
        str | None, typer.Option(help="NORM:EPS, e.g. linf:8/255 [default: the data's usual one]")
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    batch_size: Annotated[str, typer.Option(help="Images crafted at once.")] = "auto",
    workers: Workers = None,
    ray: Ray = None,
    out: Annotated[Path | None, typer.Option(help="Folder [default: runs/matrix-ID].")] = None,
    overwrite: Overwrite = False,
    data_root: DataRoot = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch the data set if it is absent.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print matrix.json instead of the table.")] = False,
    trust_code: TrustCode = False,
    debug: Debug = False,
) -> int:
    """Craft on each of several models and judge on all: table, matrix.json and a heat map. Resumes.

    \b
    robustkit matrix --models timm:resnet50,timm:vgg16 --data folder:val --limit 200 --threat linf:8/255
    """
    from robustkit.cli.verbs.matrix import matrix as work

    return work(
        models=models or [],
        targets=target or [],
        attack=attack,
        targeted=targeted,
        data=data,
        limit=limit,
        threat=threat,
        seed=seed,
        device=device,
        batch_size=batch_size,
        workers=workers,
        ray=ray,
        out=out,
        overwrite=overwrite,
        data_root=data_root,
        download=download,
        trust_code=trust_code,
        as_json=json,
    )


@verb()
def diversity(
    model: Annotated[str, typer.Argument(help="The run folder of an ensemble.")],
    data: Annotated[
        str | None, typer.Option(help="NAME[:SPLIT], folder:PATH, webdataset:PATH or FILE.npz.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N images.")] = None,
    threat: Annotated[
        str | None, typer.Option(help="NORM:EPS, e.g. linf:8/255 [default: the data's usual one]")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of PGD on each member, a fifth of eps each.")] = 50,
    restarts: Annotated[int, typer.Option(min=1, help="Random starts; an image counts if one fools.")] = 5,
    images_of: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Only the images that another comparison was on; give several."),
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder [default: runs/diversity-ID].")] = None,
    overwrite: Overwrite = False,
    data_root: DataRoot = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch the data set if it is absent.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print diversity.json instead of the tables.")] = False,
    trust_code: TrustCode = False,
    debug: Debug = False,
) -> int:
    """Attack each member of an ensemble alone; show whom else it fools, and what an oracle could make of them.

    \b
    robustkit diversity runs/dverge-3f9c21ab/ --data digits:test --threat linf:0.2

    On images that every member classifies correctly. To compare two ensembles on the same ones: --images-of.
    """
    from robustkit.cli.verbs.diversity import diversity as work

    return work(
        model,
        data=data,
        limit=limit,
        threat=threat,
        steps=steps,
        restarts=restarts,
        images_of=images_of or [],
        seed=seed,
        device=device,
        out=out,
        overwrite=overwrite,
        data_root=data_root,
        download=download,
        trust_code=trust_code,
        as_json=json,
    )


def _train(
    method: str,
    fields: dict[str, str],
    data: Annotated[
        str, typer.Option(help="NAME[:SPLIT], folder:PATH, webdataset:PATH or FILE.npz.")
    ] = "digits:train",
    test: Annotated[
        str | None, typer.Option(metavar="DATA", help="Judge the result on it [default: the data's test split].")
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The net; ARCH@WEIGHTS or a run starts there, each member at its own [default: by the data].",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N images.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the data [default: by method].")] = None,
    batch_size: Annotated[str, typer.Option(help="Images in a step; auto is the method's.")] = "auto",
    lr: Annotated[float | None, typer.Option(help="Largest learning rate [default: the method's].")] = None,
    members: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Nets trained side by side [default: the method's].")
    ] = None,
    ema: Annotated[
        float, typer.Option(metavar="DECAY", help="Write a moving average of the weights, e.g. 0.999.")
    ] = 0.0,
    augment: Annotated[str | None, typer.Option(help="none, crop or crop-flip [default: by the data].")] = None,
    seed: Seed = 0,
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16.")] = "auto",
    device: Device = "auto",
    devices: Annotated[int, typer.Option(min=1, max=1024, help="How many, with a process each.")] = 1,
    parallel: Annotated[str, typer.Option(help="What processes share: data (each batch) or members.")] = "data",
    out: Annotated[Path | None, typer.Option(help="Run folder [default: runs/METHOD-ID].")] = None,
    overwrite: Overwrite = False,
    data_root: DataRoot = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch the data set if it is absent.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print model.json instead of the table.")] = False,
    trust_code: TrustCode = False,
    debug: Debug = False,
) -> int:
    from robustkit.cli.verbs.train import train as work

    return work(
        method,
        fields,
        data=data,
        test=test,
        arch=arch,
        limit=limit,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        members=members,
        ema=ema,
        augment=augment,
        seed=seed,
        precision=precision,
        device=device,
        devices=devices,
        parallel=parallel,
        out=out,
        overwrite=overwrite,
        data_root=data_root,
        download=download,
        trust_code=trust_code,
        as_json=json,
    )


train = typer.Typer(
    cls=methods(_train),
    no_args_is_help=True,
    rich_markup_mode=None,
    subcommand_metavar="METHOD [OPTIONS]",
    help="""Train nets, or samples of a posterior. The same command resumes; the folder is a model string.

    \b
    robustkit train standard
    robustkit train csgld --arch robustkit:cifar-resnet20 --data train.npz --test test.npz --cycles 5

    Each method has flags of its own: robustkit train METHOD --help.
    """,
)
app.add_typer(train, name="train")


@train.callback()
def _method() -> None:
    """Keep the group a group."""


@verb()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A finished run's folder.")],
    model: Annotated[str | None, typer.Option(help="Where the model is now, if it has moved.")] = None,
    data: Annotated[str | None, typer.Option(help="Where the data is now, if it has moved.")] = None,
    device: Device = "auto",
    data_root: DataRoot = None,
    trust_code: TrustCode = False,
    debug: Debug = False,
) -> int:
    """Check every record of a run again: hashes, ball and box, and that the model is fooled.

    Exit code 1 if a record is bad. Borderline ones, within float noise, are listed apart.

    \b
    robustkit verify runs/evaluate-3f9c21ab
    """
    from robustkit.cli.verbs.verify import verify as work

    return work(folder, model=model, data=data, device=device, data_root=data_root, trust_code=trust_code)


@verb()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A finished run's folder.")],
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the page there.")] = None,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a card of 1200 x 630 there.")] = None,
    debug: Debug = False,
) -> int:
    """Make a page of a run: one HTML file that needs nothing else; of an evaluation also a PNG card.

    Without flags: print the table again and write the page into DIR. Reads only the run folder; of a training
    also while it goes on.

    \b
    robustkit report runs/evaluate-3f9c21ab
    robustkit report runs/evaluate-3f9c21ab --html page.html --png card.png
    """
    from robustkit.cli.verbs.report import report as work

    return work(folder, html=html, png=png)


@verb()
def compare(
    a: Annotated[Path, typer.Argument(metavar="DIR", help="A finished run's folder: A.")],
    b: Annotated[Path, typer.Argument(metavar="DIR", help="Another over the same images: B.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> int:
    """Compare two runs over the same images: paired difference, McNemar's test, who loses which image.

    Two craft runs are compared on every model that both were judged on.

    \b
    robustkit compare runs/evaluate-3f9c21ab runs/evaluate-77d0e4b2
    """
    from robustkit.cli.verbs.compare import compare as work

    return work(a, b, as_json=json)


@verb()
def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A finished run's folder.")],
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write CSV there.")] = None,
    parquet: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write Parquet there; needs pyarrow.")
    ] = None,
    debug: Debug = False,
) -> int:
    """Write a run's verdicts as a table, one row per image.

    \b
    robustkit export runs/evaluate-3f9c21ab --csv verdicts.csv
    """
    from robustkit.cli.verbs.export import export as work

    return work(folder, csv=csv, parquet=parquet)


@verb()
def doctor(
    model: Annotated[str | None, typer.Argument(help="The model; without one the machine is examined.")] = None,
    data: Annotated[
        str | None, typer.Option(help="NAME[:SPLIT], folder:PATH, webdataset:PATH or FILE.npz.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Look at the first N images [default: 64].")] = None,
    threat: Annotated[str | None, typer.Option(help="NORM:EPS [default: the data's usual one]")] = None,
    aggregator: Annotated[
        str | None,
        typer.Option(help="probabilities, logits, vote, median, crossmax or crossmax:K: its fact sheet instead."),
    ] = None,
    predictors: Annotated[int, typer.Option(min=2, help="With --aggregator: of how many predictors.")] = 8,
    classes: Annotated[int, typer.Option(min=2, help="With --aggregator: of how many classes.")] = 10,
    device: Device = "auto",
    data_root: DataRoot = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    trust_code: TrustCode = False,
    debug: Debug = False,
) -> int:
    """Look for reasons not to trust an evaluation of a model, in seconds.

    Without a model: versions, device, and a test of the machine against distances known in closed form.
    With --aggregator: what that way to combine predictors does, by random logits.

    \b
    robustkit doctor
    robustkit doctor --aggregator crossmax:3 --predictors 8 --classes 10
    robustkit doctor ./my_net.py:build@w.pt --data test.npz --threat linf:8/255
    """
    if aggregator is not None:
        from robustkit.cli.verbs.factsheet import show

        given = {"MODEL": model, "--data": data, "--limit": limit, "--threat": threat}
        return show(aggregator, predictors, classes, json, [name for name, value in given.items() if value])

    from robustkit.cli.verbs.doctor import doctor as work

    return work(
        model,
        data=data,
        limit=limit,
        threat=threat,
        device=device,
        data_root=data_root,
        trust_code=trust_code,
        as_json=json,
    )


@verb("list")
def list_(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="[attacks|techniques|recipes|methods|defenses|suites|models|data|NAME]",
            help="One of them, or a name in them: its fields with their defaults, and what they mean.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> int:
    """List what can be named: attacks, techniques, recipes, methods, defenses, suites, models, data.

    \b
    robustkit list techniques
    robustkit list cwa
    """
    from robustkit.cli.verbs.listing import show

    return show(what, json)
