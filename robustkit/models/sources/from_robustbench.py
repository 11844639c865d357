"""Nets of RobustBench (Croce et al. 2021, arXiv:2010.09670): `robustbench:NAME?threat=Linf&dataset=cifar10`."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustkit.core.errors import UsageError, did_you_mean, error_summary
from robustkit.core.preprocess import Preprocess
from robustkit.models.sources.built import Built
from robustkit.models.sources.network import quiet, reachable
from robustkit.models.sources.placeholders import placeholders
from robustkit.models.sources.source import ModelSource

if TYPE_CHECKING:
    from robustkit.models.options import Options
    from robustkit.models.strings import ModelString
    from robustkit.models.weights.files import WeightsFile
    from robustkit.models.weights.fitting import Convert

DEFAULTS = {"dataset": "cifar10", "threat": "Linf"}
CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}
THREATS = ("Linf", "L2", "corruptions", "corruptions_3d")
_DOWNLOADS = "https://drive.google.com"
_PUBLISHED = "https://raw.githubusercontent.com/RobustBench/robustbench/master/model_info"
_MAX_BYTES, _TIMEOUT = 1 << 16, 10.0
# Last parts of the names of buffers that normalise and are absent from the published checkpoints of some nets.
_NORMALISERS = frozenset({"mu", "sigma", "mean", "std"})
_PREPARED = re.compile(r"(Bicubic)?(?:Res(\d+))?(?:Crop(\d+))?")


def build(spec: ModelString, options: Options, weights: WeightsFile | None) -> Built:
    """Return a net of RobustBench's zoo, with its published weights unless a file or `pretrained=false` is given.

    Raises:
        UsageError: robustbench is missing or cannot be imported, the zoo has no such net for this data set and
            threat, or its weights could not be downloaded.
    """
    given = {**DEFAULTS, **{name: str(value) for name, value in options.keywords.items()}}
    pretrained = given.pop("pretrained", "True") != "False" and weights is None
    for name in given:
        if name not in DEFAULTS:
            raise did_you_mean(f"field of {spec.source} models", name, (*DEFAULTS, "pretrained"))
    for name, known in (("dataset", CLASSES), ("threat", THREATS)):
        if given[name] not in known:
            raise did_you_mean(name, given[name], known)
    dataset, threat = given["dataset"], given["threat"]
    entry = _entry(spec, dataset, threat)
    folder = _folder()
    with quiet(), placeholders():
        net = _download(spec, folder, dataset, threat) if pretrained else entry["model"]()
    return Built(
        net=net.eval(),
        arch=spec.arch,
        identity={"arch": spec.arch, "dataset": dataset, "threat": threat},
        num_classes=CLASSES[dataset],
        in_channels=3,
        preprocess=_preprocess(entry.get("preprocessing")),
        convert=_converter(net),
        notes=(_published(spec.name, dataset, threat, folder, weights.path.parent if weights else None),),
    )


def _entry(spec: ModelString, dataset: str, threat: str) -> Mapping[str, Any]:
    """Return the zoo's record of a net."""
    try:
        with quiet(), placeholders():
            from robustbench.model_zoo import enums, models
    except ModuleNotFoundError as error:
        what = "robustbench" if error.name == "robustbench" else f"{error.name}, which robustbench imports"
        raise UsageError(
            f"model {str(spec)!r} needs {what}: pip install robustbench, then load it again."
        ) from error
    except Exception as error:
        raise UsageError(
            f"model {str(spec)!r}: importing robustbench failed with {error_summary(error):.200}: install another "
            "version of it."
        ) from error
    kind = enums.ThreatModel(threat.removesuffix("_3d"))
    nets = models.model_dicts[enums.BenchmarkDataset(dataset)].get(kind, {})
    if spec.name not in nets:
        near = difflib.get_close_matches(spec.name, nets, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {len(nets)}, such as {next(iter(nets), '')}."
        raise UsageError(f"RobustBench has no net {spec.name!r} for {dataset} and {threat}: {hint}")
    found: Mapping[str, Any] = nets[spec.name]
    return found


def _folder() -> Path:
    import torch

    return Path(torch.hub.get_dir()) / "robustbench"


def _download(spec: ModelString, folder: Path, dataset: str, threat: str) -> Any:
    """Return the net with its published weights, from the folder or the network."""
    from robustbench.utils import load_model

    place = folder / dataset / threat.removesuffix("_3d")
    if not any(place.glob(f"{spec.name}*.pt")) and not reachable(_DOWNLOADS):
        raise _not_downloaded(spec)
    try:
        return load_model(spec.name, model_dir=str(folder), dataset=dataset, threat_model=threat)
    # gdown, requests and torch.load have no error in common.
    except Exception as error:
        raise _not_downloaded(spec) from error


def _not_downloaded(spec: ModelString) -> UsageError:
    return UsageError(
        f"the weights of {spec.arch!r} could not be downloaded or read: give a file as {spec.arch}@FILE, or write "
        "pretrained=false for an untrained net."
    )


def _converter(net: Any) -> Convert:
    """Return what gives a published checkpoint the net's names.

    Checkpoints lack the prefix of a normalisation that the zoo puts around a net, and its constants.
    """
    own = net.state_dict()
    constants = {name: value for name, value in own.items() if name.rpartition(".")[2] in _NORMALISERS}

    def convert(state: Any) -> Any:
        plain = {name.removeprefix("module.").removeprefix("model."): value for name, value in state.items()}
        forms = (state, plain, {f"model.{name}": value for name, value in plain.items()})
        return {**constants, **max(forms, key=lambda form: len(own.keys() & form.keys()))}

    return convert


def _preprocess(text: object) -> Preprocess | None:
    """Return how image files are read, by the zoo's name of it, such as Res256Crop224."""
    found = _PREPARED.fullmatch(str(text or ""))
    sides = [int(side) for side in found.groups()[1:] if side] if found else []
    if not found or not sides:
        return None
    resize = int(found[2]) if found[2] else None
    return Preprocess((sides[-1], sides[-1]), resize, "bicubic" if found[1] else "bilinear")


def _published(name: str, dataset: str, threat: str, folder: Path, beside: Path | None) -> str:
    """Return a sentence with the accuracy that RobustBench publishes, from a file or the network."""
    start = f"RobustBench ({dataset}, {threat})"
    kept = folder / dataset / threat / f"{name}.json"
    files = [*([beside / f"{name}.json"] if beside else []), kept]
    text = next((file.read_text(encoding="utf-8") for file in files if file.is_file()), None)
    if text is None and (text := _fetched(f"{_PUBLISHED}/{dataset}/{threat}/{name}.json")):
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(text, encoding="utf-8")
    try:
        body = json.loads(text or "")
        clean, robust = float(body["clean_acc"]), float(body.get("external") or body["autoattack_acc"])
    except (ValueError, KeyError, TypeError):
        return (
            f"{start} publishes an accuracy of {name}, which could not be fetched: put {name}.json "
            f"into '{kept.parent}'"
        )
    return (
        f"{start} publishes for {name}: {clean:.2f} % clean accuracy, "
        f"{robust:.2f} % robust accuracy (AutoAttack or stronger) at eps {body.get('eps', 'unknown')}"
    )


def _fetched(url: str) -> str | None:
    """Return a small text of the network; None if it cannot be fetched."""
    import urllib.request

    if not reachable(url):
        return None
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as reply:
            content: bytes = reply.read(_MAX_BYTES)
            return content.decode("utf-8")
    except (OSError, ValueError):
        return None


SOURCE = ModelSource(
    prefix="robustbench",
    help="a net of RobustBench's zoo, by ?dataset= and ?threat=, with its published accuracy",
    build=build,
    placeholder="NAME?threat=Linf&dataset=cifar10",
)
