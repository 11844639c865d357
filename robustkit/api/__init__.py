"""The verbs as functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from robustkit.api.arguments import verb
from robustkit.core.devices import model_device, pick_device
from robustkit.core.errors import UsageError
from robustkit.core.threat import EXAMPLES, ThreatModel
from robustkit.crafting.run import run_craft
from robustkit.crafting.spec import DEFAULT_ATTACK, DEFAULT_COMBINE, CraftRequest
from robustkit.data import from_arrays, load_data
from robustkit.data.classes import matched
from robustkit.data.samples import Samples
from robustkit.data.sources.loaders import from_dataset, is_dataset
from robustkit.diagnostics.ensemble_diversity import Comparison
from robustkit.engine.allocation.rounds import read_strictness
from robustkit.engine.evaluation.early_stopping import Limits
from robustkit.engine.evaluation.minimum_norm import nearest_points
from robustkit.engine.evaluation.nearest_points import MinimumNorm
from robustkit.engine.evaluation.run import Evaluation
from robustkit.engine.evaluation.verify_run import Verification, verify_run
from robustkit.engine.model.loaded_models import gather_both
from robustkit.engine.planning.cost_probe import CostProbe
from robustkit.engine.planning.forecast import forecast_cost as measure
from robustkit.engine.progress import Progress
from robustkit.models import as_classifier, load_model
from robustkit.models.label_matching import matched_to
from robustkit.registry import DEFAULT_SUITE, Suite, parse_method
from robustkit.runs.craft_record import Craft
from robustkit.runs.diversity_record import Diversity
from robustkit.runs.evaluation_record import Report
from robustkit.runs.forecast_record import DEVICES, Plan
from robustkit.runs.training_record import Trained
from robustkit.training.defaults import judged_by, sibling
from robustkit.training.method import Method
from robustkit.training.progress import TrainProgress
from robustkit.training.train import Training

# A model string, or logits of images.
Model = str | Callable[[torch.Tensor], Any]


@verb
def evaluate(
    model: Callable[[torch.Tensor], Any],
    images: Any,
    labels: Any = None,
    threat: ThreatModel | str | float | tuple[str, float | str] | None = None,
    *,
    suite: Suite = DEFAULT_SUITE,
    seed: int = 0,
    device: str | torch.device = "auto",
    precision: str = "auto",
    batch_size: int | None = None,
    curve: bool = False,
    audit: int = 0,
    strictness: str | float | None = None,
    time_limit: float | None = None,
    stop_at_width: float | None = None,
    workers: int | None = None,
    ray: str | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Return how robust a classifier is on these images, verified sample by sample.

    Args:
        model: any callable from images (B C H W) on [0, 1] to logits (B K); tuples and dicts that hold the
            logits are understood, and `as_classifier` says which entry they are where that is not clear. A module
            is put into eval mode for the run and back after.
        images: (N C H W) floats in [0, 1], or uint8; or a `DataLoader`, a dataset or iterator of (image, label)
            pairs or batches, or what `load_data` returns, without `labels`: `evaluate(model, loader,
            threat="linf:8/255")`.
        labels: (N) whole numbers from 0 to K - 1 of any type, one-hot rows (N K), or names of classes, which are
            numbered as they sort.
        threat: what the attacker may do, as a `ThreatModel` or its string, e.g. `linf:8/255`; a pair
            `("l2", 0.5)`; or a number alone, which is an eps in linf.
        suite: the attacks, e.g. `autoattack` or `pgd(steps=100),autoattack:square`; or an attack object, a
            function `(model, x, y, eps) -> x_adv`, or a list of any of these.
        seed: of every random number.
        device: `auto` is where the model's parameters are; another moves the model there.
        precision: of the search for adversarials: `fp32`, `bf16` or `fp16`; `auto` lets row-wise attacks search in
            bf16 where that is faster. Verdicts are float32.
        batch_size: images that an attack gets at once; None lets the engine choose.
        curve: search for each image's smallest fooling eps as well: `report.curve`.
        audit: on how many of the survivors, drawn at random, to run full AutoAttack as well: `report.audit`.
        strictness: go on until at most this share of the images, e.g. `0.0005` or `"0.05 %"`, could still fall to
            AutoAttack, by a 95 % bound: `report.strictness`. None is 0.2 %, or one image of a small set; 0 gives
            every image every attack. For suites with arms, such as `auto` and `rapid`.
        time_limit: seconds after which to stop and report on the images done, taken in random order.
        stop_at_width: stop as soon as the 95 % interval of the robust accuracy is no wider, e.g. 0.02.
        workers: processes that share the attacks, one per GPU or per share of the cores; None is 1, or with `ray`
            what the cluster has room for. In a script the call has to stand under `if __name__ == "__main__":`.
        ray: the address of a Ray cluster to have them on: `auto`, `HOST:PORT`, or `local` for one on this machine.
        out: a folder for the ledger and the report; the same call resumes there.
        overwrite: remove the run that `out` holds, and begin anew; files that robustkit did not write stay.
        progress: who to tell on the way.

    Raises:
        UsageError: for a request that cannot be carried out.
        RunError: when it fails on the way.
    """
    samples, rules = _given(images, labels, threat)
    classifier = as_classifier(model)
    place = model_device(classifier) if str(device) == "auto" else pick_device(str(device))
    plan = Evaluation(
        model=classifier.to(place),
        samples=matched_to(samples, classifier),
        threat=rules,
        suite=suite,
        seed=seed,
        device=place,
        precision=precision,
        batch_size=batch_size,
        curve=curve,
        audit=audit,
        strictness=read_strictness(strictness),
        limits=Limits(time_limit, stop_at_width),
        workers=workers,
        ray=ray,
    )
    return plan.run(Path(out) if out is not None else None, progress, overwrite=overwrite)


@verb
def minimum_norm(
    model: Model,
    x: Any,
    y: Any = None,
    norm: str = "l2",
    *,
    attack: Suite = DEFAULT_SUITE,
    seed: int = 0,
    device: str | torch.device = "auto",
    batch_size: int = 256,
    trust_code: bool = False,
) -> MinimumNorm:
    """Return the nearest adversarial image of each image, and how far it is.

    Args:
        model: a model string, or any callable from images (B C H W) on [0, 1] to logits, as in `evaluate`.
        x: images (B C H W) on [0, 1], or what else `evaluate` takes for images.
        y: their labels (B), as in `evaluate`.
        norm: `linf`, `l2` or `l1`.
        attack: `auto`, which takes the best of several; or attacks that find minimum norms, such as
            `fmn(steps=200),ddn`.
        seed: of every random number.
        device: `auto` is where the model's parameters are; another moves the model there.
        batch_size: images that are attacked at once.
        trust_code: run Python code that the record of a run folder names, too.

    Raises:
        UsageError: for a request that cannot be carried out.
        RunError: when it fails on the way.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, got {batch_size}.")
    if norm.strip().lower() not in EXAMPLES:
        raise UsageError(f"norm must be linf, l2 or l1, got {norm!r}.")
    classifier = load_model(model, trust_code=trust_code) if isinstance(model, str) else as_classifier(model)
    place = model_device(classifier) if str(device) == "auto" else pick_device(str(device))
    return nearest_points(
        classifier.to(place),
        matched_to(_samples(x, y), classifier),
        ThreatModel.parse(f"{norm}:min"),
        suite=attack,
        seed=seed,
        device=place,
        batch_size=batch_size,
    )


@verb
def plan(
    model: Callable[[torch.Tensor], Any],
    images: Any,
    labels: Any = None,
    threat: ThreatModel | str | float | tuple[str, float | str] | None = None,
    *,
    suite: Suite = DEFAULT_SUITE,
    seed: int = 0,
    device: str | torch.device = "auto",
    precision: str = "auto",
    batch_size: int | None = None,
    strictness: str | float | None = None,
    seconds: float = 10.0,
    devices: Sequence[int] = DEVICES,
    price: float | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Return what `evaluate` with the same arguments would take, on one device and on several.

    It attacks images drawn at random, for about so many seconds, and simulates the rest; nothing is written.

    Args:
        model: as in `evaluate`.
        images: as in `evaluate`; all that are to be evaluated.
        labels: as in `evaluate`.
        threat: what the attacker may do, as in `evaluate`, e.g. `linf:8/255`.
        suite: the attacks, e.g. `autoattack` or `pgd(steps=100),autoattack:square`.
        seed: of every random number.
        device: `auto` is where the model's parameters are; another moves the model there.
        precision: of the search for adversarials: `fp32`, `bf16` or `fp16`, or `auto`.
        batch_size: images that an attack gets at once; None lets the engine choose.
        strictness: the share of the images that may be left in doubt, as in `evaluate`.
        seconds: how long to attack; more makes the intervals narrower.
        devices: how many devices, like the one measured, to tell of.
        price: of a device for an hour.
        progress: who to tell on the way.

    Raises:
        UsageError: for a request that cannot be carried out.
        RunError: when it fails on the way.
    """
    samples, rules = _given(images, labels, threat)
    classifier = as_classifier(model)
    place = model_device(classifier) if str(device) == "auto" else pick_device(str(device))
    probe = CostProbe(
        model=classifier.to(place),
        samples=matched_to(samples, classifier),
        threat=rules,
        suite=suite,
        seed=seed,
        device=place,
        precision=precision,
        batch_size=batch_size,
        strictness=read_strictness(strictness),
        budget=seconds,
    )
    return measure(probe, devices, price, progress)


@verb
def craft(
    surrogates: Model | Sequence[Model],
    images: Any,
    labels: Any = None,
    threat: ThreatModel | str | float | tuple[str, float | str] | None = None,
    *,
    attack: str = DEFAULT_ATTACK,
    combine: str = DEFAULT_COMBINE,
    weights: Sequence[float] | None = None,
    targets: Model | Sequence[Model] = (),
    targeted: str | None = None,
    forecast: bool = False,
    budgets: Sequence[int] = (),
    seed: int = 0,
    device: str | torch.device = "auto",
    batch_size: int | None = None,
    streaming: bool | None = None,
    png: str | Path | None = None,
    workers: int | None = None,
    ray: str | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    trust_code: bool = False,
    progress: Progress | None = None,
) -> Craft:
    """Return adversarial images made on surrogates, and what they do to models that the attack has not seen.

    Args:
        surrogates: models to craft on, as strings or callables as in `evaluate`; one, or several in a list.
        images: as in `evaluate`.
        labels: as in `evaluate`.
        threat: what the attacker may do, as in `evaluate`, e.g. `linf:8/255`.
        attack: an attack with techniques, e.g. `mi-fgsm(steps=20)`.
        combine: what is averaged over the surrogates: `logits`, `probabilities`, `loss`,
            `gradients` or `consensus` (see `Surrogates`).
        weights: of the surrogates, one each; by default all the same.
        targets: models to judge the images on: `craft(...).targets`.
        targeted: aim at a class, `next`, `random` or `least-likely`; None for any other than the label.
        forecast: leave each surrogate out in turn, to tell what unseen models may expect: `.forecast`.
        budgets: gradients per image to craft at as well: `.budgets`.
        seed: of every random number.
        device: where to compute; `auto` is CUDA where there is one.
        batch_size: images crafted at once; None chooses.
        streaming: one surrogate in memory at a time, or all with False; None decides by the memory there is.
        png: a folder for the images as 8-bit files within the threat.
        workers: processes that share the crafting, as in `evaluate`.
        ray: the address of a Ray cluster to have them on, as in `evaluate`.
        out: a folder for the ledger, the images and the record; the same call resumes there.
        overwrite: remove the run that `out` holds, and begin anew; files that robustkit did not write stay.
        trust_code: run Python code that the record of a run folder names, too.
        progress: who to tell on the way.

    Returns:
        The record, with the fields of transfer.json; `.adversarial["x"]` are the images (N C H W), in order.

    Raises:
        UsageError: for a request that cannot be carried out.
        RunError: when it fails on the way.
    """
    place = pick_device(device)
    samples, rules = _given(images, labels, threat)
    nets, judges = gather_both(
        _listed(surrogates), _listed(targets), samples, place, streaming, trust_code=trust_code
    )
    plan = CraftRequest(
        nets=nets,
        samples=matched(samples, nets[0].classes, nets[0].class_names) if nets else samples,
        threat=rules,
        attack=attack,
        combine=combine,
        weights=weights,
        targeted=targeted,
        seed=seed,
        device=place,
        batch_size=batch_size,
        streaming=streaming,
        workers=workers,
        ray=ray,
    )
    return run_craft(
        plan,
        Path(out) if out is not None else None,
        judges,
        forecast=forecast,
        curve=budgets,
        png=Path(png) if png is not None else None,
        progress=progress,
        overwrite=overwrite,
    )


def _listed(models: Model | Sequence[Model]) -> Sequence[Model]:
    if isinstance(models, torch.nn.ModuleList):  # which is callable by its base alone
        return list(models)
    if isinstance(models, str) or callable(models):
        return [models]
    if not isinstance(models, Sequence):
        raise UsageError(
            "models must be model strings, torch.nn.Modules or functions from images to logits, or a list of "
            f"them, got {type(models).__name__}."
        )
    return models


@verb
def diversity(
    model: str | Callable[[torch.Tensor], Any],
    images: Any,
    labels: Any = None,
    threat: ThreatModel | str | float | tuple[str, float | str] | None = None,
    *,
    steps: int = 50,
    restarts: int = 5,
    only: Sequence[int] | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    out: str | Path | None = None,
    overwrite: bool = False,
    trust_code: bool = False,
    progress: Progress | None = None,
) -> Diversity:
    """Return how far the members of an ensemble share weaknesses, each attacked alone.

    Args:
        model: an ensemble: the string of its run folder, or what `load_model` makes of it.
        images: as in `evaluate`.
        labels: as in `evaluate`.
        threat: what the attacker may do, as in `evaluate`, e.g. `linf:8/255`.
        steps: of PGD on each member, each a fifth of eps.
        restarts: random starts; an image counts as fooled if one of them fools.
        only: positions of the images to look at, to compare ensembles on the same; None for all. Those that a
            member classifies wrongly are left out in any case.
        seed: of every random number.
        device: where to compute; `auto` is CUDA where there is one.
        out: a folder for diversity.json; the same call returns what is there.
        overwrite: remove the run that `out` holds, and begin anew; files that robustkit did not write stay.
        trust_code: run Python code that the record of a run folder names, too.
        progress: who to tell on the way.

    Raises:
        UsageError: for a model without members, or too few images that all of them classify correctly.
    """
    place = pick_device(device)
    samples, rules = _given(images, labels, threat)
    classifier = (
        load_model(model, device=place, trust_code=trust_code)
        if isinstance(model, str)
        else as_classifier(model).to(place)
    )
    comparison = Comparison(
        model=classifier,
        samples=matched_to(samples, classifier),
        threat=rules,
        steps=steps,
        restarts=restarts,
        seed=seed,
        images=only,
        device=place,
    )
    return comparison.run(Path(out) if out is not None else None, progress, overwrite)


@verb
def train(
    method: str | Method,
    data: str | Samples | Any = "digits:train",
    labels: Any = None,
    *,
    test: str | Samples | None = None,
    arch: str | None = None,
    limit: int | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    members: int | None = None,
    ema: float = 0.0,
    augment: str | None = None,
    seed: int = 0,
    precision: str = "auto",
    device: str | torch.device = "auto",
    devices: int = 1,
    parallel: str = "data",
    out: str | Path | None = None,
    overwrite: bool = False,
    trust_code: bool = False,
    progress: TrainProgress | None = None,
) -> Trained:
    """Return the record of a net, or of samples of a posterior, trained as a method has it.

    What is None is the method's usual, sized to the data.

    Args:
        method: one of `robustkit list methods`, with its fields, e.g. `csgld(cycles=3)`.
        data: a data string, or images (N C H W) with `labels`.
        labels: as in `evaluate`, for images.
        test: data to judge the result on; by default the test split beside a named training split.
        arch: a model string; initial weights are the seed's, unless it names a file or a run's folder.
        limit: only the first N images.
        epochs: passes over the data.
        batch_size: images in a step, over all devices.
        lr: the largest learning rate.
        members: nets trained side by side.
        ema: decay of a moving average of the weights, which is then written instead of the last ones.
        augment: `none`, `crop` or `crop-flip`; by default by the data.
        seed: of every random number.
        precision: `fp32` or `bf16`; `auto` is bf16 on a GPU that has it.
        device: where to train; `auto` is CUDA where there is one.
        devices: how many of them on this host, with a process each; under torchrun or srun it is theirs to say.
        parallel: what processes share: `data`, each batch, or `members`, of methods whose members divide.
        out: the run's folder, by default `runs/METHOD-ID`; the same call resumes there, or returns what is there.
        overwrite: remove the run that `out` holds, and begin anew; files that robustkit did not write stay.
        trust_code: run Python code that the record of a run folder names, too.
        progress: who to tell on the way.

    Raises:
        UsageError: for a request that cannot be carried out.
        RunError: when it fails on the way.
    """
    value = parse_method(method) if isinstance(method, str) else method
    if isinstance(data, str):
        judging = test or sibling(data)
        samples = load_data(data)
    else:
        judging, samples = test, _samples(data, labels)
    held_out = load_data(judging) if isinstance(judging, str) else judging
    plan = Training(
        method=value,
        samples=samples.head(limit),
        test=None if held_out is None else judged_by(held_out, samples),
        arch=arch,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        members=members,
        ema=ema,
        augment=augment,
        precision=precision,
        seed=seed,
        device=pick_device(device),
        devices=devices,
        parallel=parallel,
        trust_code=trust_code,
    )
    folder = Path(out) if out is not None else Path("runs") / f"{plan.method.info.name}-{plan.spec.run_id}"
    return plan.run(folder, progress, overwrite)


@verb
def verify(
    folder: str | Path,
    model: Callable[[torch.Tensor], Any] | None = None,
    images: Any = None,
    labels: Any = None,
    *,
    device: str = "auto",
    trust_code: bool = False,
) -> Verification:
    """Check every record of a finished run again; see `Verification.bad`.

    Model and data are loaded by the strings in the run's spec unless they are given, and not at all where the
    folder's files are not those of the run.

    Args:
        folder: the run's folder.
        model: any callable as in `evaluate`, instead of the one that the spec names.
        images: (N C H W) floats in [0, 1], or uint8, instead of the data that the spec names.
        labels: (N) whole numbers from 0 to K - 1, for images.
        device: where to compute; `auto` is where the model is.
        trust_code: run Python code that the spec, or the record of a run folder that it names, names.

    Raises:
        UsageError: if the folder holds no finished run, or model or data cannot be loaded, or the spec names code
            that is not trusted.
    """
    classifier = None if model is None else as_classifier(model)
    samples = None if images is None else _samples(images, labels)
    return verify_run(
        Path(folder),
        model=classifier,
        samples=samples if samples is None or classifier is None else matched_to(samples, classifier),
        device=None if device == "auto" else pick_device(device),
        trust_code=trust_code,
    )


def _given(
    images: Any, labels: Any, threat: ThreatModel | str | float | tuple[str, float | str] | None
) -> tuple[Samples, ThreatModel]:
    """Return what a call is about; data that holds its labels may be followed by the threat at once."""
    if threat is None and isinstance(labels, str | float | ThreatModel):
        labels, threat = None, labels
    if threat is None:
        raise UsageError("no threat is given; pass threat='linf:8/255' or such.")
    return _samples(images, labels), ThreatModel.of(threat)


def _samples(images: Any, labels: Any) -> Samples:
    """Return the samples of arrays with their labels, or of data that holds them itself."""
    if isinstance(images, Samples):
        return images
    if labels is not None and isinstance(images, DataLoader | Dataset):
        raise UsageError(f"a {type(images).__name__} holds its labels itself; leave the labels out.")
    if labels is None and isinstance(images, str):
        raise UsageError(f"the images are the string {images!r}; pass robustkit.load_data({images!r}).")
    if labels is None and is_dataset(images):
        return from_dataset(images)
    if labels is None:
        raise UsageError("the images have no labels; pass images and labels, a DataLoader, or a dataset of pairs.")
    return from_arrays(images, labels)
