"""From a model string to a classifier."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import nn

from robustkit.core.devices import pick_device
from robustkit.core.errors import UsageError
from robustkit.core.isolation import default_torch_modes, same_folder, seeded, switch_mode
from robustkit.core.preprocess import Preprocess
from robustkit.models.classifier import Classifier, bare, with_numbers
from robustkit.models.ensembles import from_several
from robustkit.models.options import Options, read_mean, read_size, read_std
from robustkit.models.prepared_net import Form
from robustkit.models.sources import from_code, from_run
from robustkit.models.sources.built import Built
from robustkit.models.sources.kinds import no_such_kind
from robustkit.models.sources.source import find_source, own_sources
from robustkit.models.strings import ENSEMBLE, FOLDER, SOURCE, UNKNOWN, ModelString
from robustkit.models.weights.files import WeightsFile, read_weights
from robustkit.models.weights.loading import Loaded, put_weights
from robustkit.registry.strings import absolute_defenses


@default_torch_modes()
def load_model(
    string: str, *, device: str | torch.device = "cpu", seed: int = 0, trust_code: bool = False
) -> Classifier:
    """Return the classifier that a model string names, in eval mode.

    The string is `ARCH[@WEIGHTS][?mean=r,g,b&std=r,g,b&size=N&num_classes=K&defense=NAME:VALUE+...]`, or a folder
    that a training run wrote, `runs/x/`, with `#2` for its third member or posterior sample, or several strings as
    one, `ensemble:[A;B;C]`; a model of several nets takes `?combine=` for how they are joined. Size and
    normalisation are taken from the query, else from the metadata of the weights file or the folder, else from
    timm's or torchvision's own record, else left out; image files are read at that size.

    A string that names Python code, `module:factory` or `./net.py:factory`, runs it: pass no string that you
    read from a file of another author. Code that a folder's own record names is run only with `trust_code`.

    Args:
        string: The model string.
        device: Where its tensors lie afterwards.
        seed: Draws the initial weights of a net, or of a last layer, that no weights are loaded into.
        trust_code: Whether Python code that the record of a run folder names is run.

    Raises:
        UsageError: A part of the string is not possible; the message names it, and what to write instead.
    """
    spec = ModelString.parse(string)
    if spec.kind == UNKNOWN:
        raise no_such_kind(spec)
    if spec.kind == FOLDER and not from_run.is_run(spec):
        raise _no_model(spec)
    target = pick_device(device)
    options = Options.read(spec)
    weights = _weights(spec, options)
    with seeded(seed), same_folder():
        if spec.kind == FOLDER:
            built, options = from_run.Run.read(spec).build(options, _net, trust_code)
        elif spec.kind == ENSEMBLE:
            built = from_several.build(spec, options, partial(_member, trust_code=trust_code), seed)
        else:
            built = _net(spec, options, weights)
    built = replace(built, net=bare(built.net))
    loaded = None
    if weights is not None:
        loaded = put_weights(built.net, weights, spec.arch, choice=options.weights, convert=built.convert)
    built = replace(built, net=with_numbers(built.net, str(spec)))
    _check_finite(built.net, spec)
    options = _with_metadata(options, weights, loaded)
    mean, std = options.mean or built.mean, options.std or built.std
    _check_channels(built, mean, std)
    query = spec.options if options.noise is None else {**spec.options, "noise": options.noise}
    query = {**query, **built.fields}
    if "defense" in query:
        query = {**query, "defense": absolute_defenses(query["defense"])}
    path = str(weights.path) if weights and spec.weights else None
    written = replace(spec, arch=built.arch, weights=path, options=query)
    classifier = Classifier(
        built.net,
        string=str(written),
        identity=built.identity,
        mean=mean,
        std=std,
        size=options.size,
        num_classes=built.num_classes,
        in_channels=built.in_channels,
        defenses=options.defenses,
        preprocess=_preprocess(options.size, built.preprocess),
        class_names=built.class_names,
        output=options.output,
        binary=options.binary,
        trust_code=trust_code,
        notes=(*built.notes, *(loaded.notes if loaded else ())),
    )
    classifier.access = built.access
    classifier.net_call.form = Form(batch=built.batch)
    switch_mode(classifier, False)
    return classifier.to(target)


def _member(string: str, seed: int, trust_code: bool) -> Classifier:
    return load_model(string, seed=seed, trust_code=trust_code)


def _net(spec: ModelString, options: Options, weights: WeightsFile | None) -> Built:
    """Return the net of a model source or of Python code."""
    build = find_source(spec.source).build if spec.kind == SOURCE else from_code.build
    return build(spec, options, weights)


def _weights(spec: ModelString, options: Options) -> WeightsFile | None:
    if spec.weights is not None:
        return read_weights(spec.weights)
    return find_source(spec.source).own_weights(spec) if spec.kind == SOURCE and options.pretrained else None


def _with_metadata(options: Options, weights: WeightsFile | None, loaded: Loaded | None) -> Options:
    """Return the options; those that are not set are taken from the weights file."""
    if weights is None or loaded is None:
        return options
    metadata, where = weights.metadata, f"the metadata of '{weights.path}'"
    mean = read_mean(metadata["mean"], where) if "mean" in metadata else loaded.mean
    std = read_std(metadata["std"], where) if "std" in metadata else loaded.std
    size = read_size(metadata["size"], where) if "size" in metadata else None
    return replace(options, mean=options.mean or mean, std=options.std or std, size=options.size or size)


def _check_channels(built: Built, *normalisation: tuple[float, ...] | None) -> None:
    for numbers in normalisation:
        if numbers and built.in_channels and len(numbers) not in (1, built.in_channels):
            raise UsageError(
                f"{built.arch} takes images of {built.in_channels} channels but its mean or std has "
                f"{len(numbers)} numbers: write one number per channel, or one for all."
            )


def _check_finite(net: object, spec: ModelString) -> None:
    parameters = net.named_parameters() if isinstance(net, nn.Module) else ()
    for name, parameter in parameters:
        if not parameter.isfinite().all():
            raise UsageError(
                f"{str(spec)!r} has NaN or infinite values in {name!r}: give other weights, as {spec.arch}@FILE."
            )


def _preprocess(size: tuple[int, int] | None, source: Preprocess | None) -> Preprocess | None:
    """Return how image files are read: as the source does, but at the size of the query if it has one."""
    if size is None or (source is not None and source.size == size):
        return source
    return Preprocess(size, min(size), source.interpolation if source else Preprocess.interpolation)


def _no_model(spec: ModelString) -> UsageError:
    text, folder = str(spec), from_run.folder_of(spec)
    for source in own_sources():
        if spec.arch.partition("@")[0] in source.nets:
            return UsageError(f"model {text!r} has no source: write '{source.prefix}:{text}'.")
    if any(folder.glob("checkpoint*")):
        return UsageError(
            f"the training in '{folder}' has not ended: give the same 'robustkit train' command again, and "
            "the folder when it has."
        )
    if folder.is_dir():
        return UsageError(
            f"the folder '{folder}' has no model.json: write a folder that 'robustkit train' wrote, or "
            "ARCH@WEIGHTS."
        )
    if folder.is_file():
        return UsageError(
            f"model {text!r} is a file: write ARCH@FILE if it holds weights, or 'torchscript:{text}' if it is "
            "TorchScript, which is code that is then run."
        )
    return UsageError(
        f"model {text!r} is neither a folder nor KIND:NAME: write for example robustkit:digits-cnn, "
        "timm:resnet50, torchvision:resnet50, module:factory or ./net.py:factory."
    )
