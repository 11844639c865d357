"""Nets of timm: `timm:NAME`, `timm:hf-hub:OWNER/NAME` of the Hugging Face hub, `timm:local-dir:FOLDER`."""

from __future__ import annotations

import difflib
import math
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from robustkit.core.errors import UsageError, did_you_mean, error_summary, expand_path
from robustkit.core.preprocess import Preprocess
from robustkit.models.sources.built import Built
from robustkit.models.sources.network import offline_if_unreachable, quiet
from robustkit.models.sources.source import ModelSource

# How names begin that are no names of timm's own nets: a repository of the hub, a folder.
_HUB, _FOLDER = "hf-hub:", "local-dir:"

if TYPE_CHECKING:
    from robustkit.models.options import Options
    from robustkit.models.strings import ModelString
    from robustkit.models.weights.files import WeightsFile
    from robustkit.models.weights.fitting import Convert


def build(spec: ModelString, options: Options, weights: WeightsFile | None) -> Built:
    """Return a net of timm, with its pretrained weights unless a file or `pretrained=false` is given.

    Raises:
        UsageError: timm has no such net, no weights for it, or they could not be downloaded.
    """
    from robustkit.models.weights.fitting import sizes_in

    with quiet():
        from timm.data import resolve_data_config

        pretrained = options.pretrained and weights is None
        spec = _with_absolute_path(spec)
        if not spec.name.startswith((_HUB, _FOLDER)):
            _check_name(spec, pretrained)
        try:
            with offline_if_unreachable(local=spec.name.startswith(_FOLDER)):
                net = _create(spec, pretrained, options.num_classes)
        except OSError as error:
            if spec.name.startswith((_HUB, _FOLDER)):
                raise _no_repository(spec) from error
            raise UsageError(
                f"timm's weights for {spec.name!r} could not be downloaded: give a file as "
                f"{spec.arch}@FILE.safetensors, or write {spec.arch}?pretrained=false for an untrained net."
            ) from error
        if weights is not None and options.num_classes is None:
            classes, _ = sizes_in(weights, net, options.weights, _convert(net))
            net = net if classes is None else _create(spec, False, classes)
        data = resolve_data_config({}, model=net)
    is_folder = spec.name.startswith(_FOLDER)
    return Built(
        net=net,
        arch=spec.arch,
        # Where a folder lies is no part of what its net computes.
        identity={
            "arch": net.default_cfg["architecture"] if is_folder else spec.arch,
            "num_classes": net.num_classes,
        },
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        num_classes=net.num_classes,
        preprocess=_preprocess(data),
        convert=_convert(net),
        class_names=_class_names(net),
    )


def _with_absolute_path(spec: ModelString) -> ModelString:
    """Return the string of a folder with its absolute path; another string as it is.

    Raises:
        UsageError: There is no such folder of timm.
    """
    if not spec.name.startswith(_FOLDER):
        return spec
    folder = expand_path(spec.name.removeprefix(_FOLDER)).absolute()
    if not (folder / "config.json").is_file():
        raise UsageError(f"there is no config.json of timm in '{folder}' for model {str(spec)!r}: check the path.")
    return replace(spec, arch=f"{spec.source}:{_FOLDER}{folder}")


def _no_repository(spec: ModelString) -> UsageError:
    """Return the error for a repository or folder that cannot be loaded."""
    what = "could not be downloaded" if spec.name.startswith(_HUB) else "has no weights"
    return UsageError(
        f"timm's net {spec.name!r} {what}: check the name and the network, or write the path of its folder as "
        f"timm:{_FOLDER}FOLDER."
    )


def names() -> list[str]:
    """Return the names of timm's nets, without their tags."""
    with quiet():
        import timm

        names: list[str] = timm.list_models()
    return names


def _create(spec: ModelString, pretrained: bool, num_classes: int | None) -> Any:
    import timm

    kwargs = {} if num_classes is None else {"num_classes": num_classes}
    try:
        return timm.create_model(spec.name, pretrained=pretrained, **kwargs)
    except (KeyError, RuntimeError, ValueError) as error:
        if not spec.name.startswith((_HUB, _FOLDER)):
            raise
        raise UsageError(
            f"{spec.name!r} is no net of timm ({error_summary(error):.200}): check the name."
        ) from error


def _convert(net: Any) -> Convert | None:
    """Return timm's own translation of the checkpoints that a net's authors published."""
    function = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
    return None if function is None else lambda state: function(state, net)


def _class_names(net: Any) -> tuple[str, ...] | None:
    """Return the names of the classes where timm's record of the weights has one for each."""
    names = (getattr(net, "pretrained_cfg", None) or {}).get("label_names") or ()
    return tuple(map(str, names)) if len(names) == net.num_classes else None


def _check_name(spec: ModelString, pretrained: bool) -> None:
    import timm

    arch = spec.name.partition(".")[0]
    if not timm.is_model(arch):
        near = difflib.get_close_matches(arch, names(), n=1)
        hint = f"did you mean 'timm:{near[0]}'?" if near else "timm.list_models() names them all."
        raise UsageError(f"timm has no model {spec.name!r}: {hint}")
    tagged = [name for name in timm.list_pretrained(f"{arch}*") if name.partition(".")[0] == arch]
    if spec.name != arch and spec.name not in tagged:
        raise did_you_mean("timm model", spec.name, [arch, *tagged])
    if pretrained and not tagged:
        raise UsageError(
            f"timm has no weights for {spec.name!r}: give a file as {spec.arch}@FILE.safetensors, or write "
            f"{spec.arch}?pretrained=false for an untrained net."
        )


def _preprocess(data: dict[str, Any]) -> Preprocess:
    _, height, width = data["input_size"]
    resize = math.floor(min(height, width) / data["crop_pct"])
    return Preprocess((height, width), resize, data["interpolation"])


SOURCE = ModelSource(
    prefix="timm",
    help="any timm model, pretrained unless @WEIGHTS or ?pretrained=false",
    build=build,
    fields=frozenset({"num_classes", "pretrained"}),
    names=names,
)
