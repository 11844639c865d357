"""Image classifiers of transformers: `hf:NAME` on the Hugging Face hub, or `hf:FOLDER`."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustkit.core.errors import UsageError, error_summary, expand_path
from robustkit.models.sources.built import Built
from robustkit.models.sources.network import offline_if_unreachable, quiet
from robustkit.models.sources.source import ModelSource

if TYPE_CHECKING:
    import torch

    from robustkit.models.options import Options
    from robustkit.models.strings import ModelString
    from robustkit.models.weights.files import WeightsFile


def build(spec: ModelString, options: Options, weights: WeightsFile | None) -> Built:
    """Return a classifier of transformers; resizing, crop and normalisation are those of its image processor.

    Raises:
        UsageError: transformers is missing, or the model is, or it is no image classifier, has no trained last
            layer or needs code of its repository.
    """
    name, arch = place_of(spec)
    transformers = library(spec)
    from robustkit.models.sources.image_processor import ImageSettings, PreparedImages

    pretrained = options.pretrained and weights is None
    if pretrained and options.num_classes is not None:
        raise UsageError(
            f"the weights of {arch!r} determine its classes: leave num_classes out, or write pretrained=false "
            "beside it."
        )
    classes = {} if options.num_classes is None else {"num_labels": options.num_classes}
    with quiet(), offline_if_unreachable(local=Path(name).is_dir()):
        try:
            config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, **classes)
            net, missing = _net(transformers, name, config, pretrained)
        except (OSError, ValueError, ImportError, RuntimeError) as error:
            raise unavailable(arch, "image classifier", error) from error
        settings = processor_settings(transformers, name, ImageSettings)
    if missing:
        raise UsageError(
            f"{arch!r} has no trained weights for {missing[0]!r}: give the name of a model that was trained to "
            "classify images."
        )
    return Built(
        net=PreparedImages(net, settings, _logits),
        arch=arch,
        identity={"arch": spec.source, "config": _config_sha256(config), "images": repr(settings)},
        mean=settings.mean,
        std=settings.std,
        num_classes=int(config.num_labels),
        in_channels=getattr(config, "num_channels", None),
        preprocess=settings.preprocess,
        convert=lambda state: {f"net.{key}": value for key, value in state.items()},
        class_names=_class_names(config),
    )


def place_of(spec: ModelString) -> tuple[str, str]:
    """Return what transformers is given and how to write it from any folder: a folder's path, or a name."""
    path = expand_path(spec.name).absolute()
    if path.is_dir():
        return str(path), f"{spec.source}:{path}"
    if spec.name.startswith((".", "/", "~")):
        raise UsageError(f"there is no folder '{path}' for model {str(spec)!r}: check the path.")
    return spec.name, spec.arch


def library(spec: ModelString) -> Any:
    """Return the module transformers.

    Raises:
        UsageError: It is not installed.
    """
    try:
        with quiet():
            import transformers
    except ImportError as error:
        raise UsageError(
            f"model {str(spec)!r} needs transformers: pip install transformers, then load it again."
        ) from error
    transformers.utils.logging.disable_progress_bar()
    return transformers


def unavailable(arch: str, what: str, error: Exception) -> UsageError:
    """Return the error for a model that transformers does not load."""
    return UsageError(
        f"{arch!r} is no {what} that transformers loads ({error_summary(error):.300}): check the name and the "
        "network, or write the path of its folder."
    )


def processor_settings(transformers: Any, name: str, settings: Any) -> Any:
    """Return what the image processor of a model does; nothing if the model has none."""
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError):
        return settings(None, None, None, None, "bilinear")
    return settings.read(processor)


def _net(transformers: Any, name: str, config: Any, pretrained: bool) -> tuple[Any, list[str]]:
    """Return the net, and the names of its tensors that have no trained values."""
    auto = transformers.AutoModelForImageClassification
    if not pretrained:
        return auto.from_config(config, trust_remote_code=False).eval(), []
    import torch

    net, info = auto.from_pretrained(
        name, config=config, trust_remote_code=False, output_loading_info=True, dtype=torch.float32
    )
    return net.eval(), sorted(info["missing_keys"])


def _logits(net: Any, images: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = net(pixel_values=images).logits
    return logits


def _config_sha256(config: Any) -> str:
    """Return the hash of a configuration without the path that it was read from."""
    text = config.to_json_string(use_diff=False) if hasattr(config, "to_json_string") else repr(config)
    lines = [line for line in text.splitlines() if '"_name_or_path"' not in line]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _class_names(config: Any) -> tuple[str, ...] | None:
    """Return the names of the classes; None for the names that transformers gives to classes without one."""
    names = tuple(str(config.id2label.get(number, "")) for number in range(config.num_labels))
    return None if not all(names) or names[0].startswith("LABEL_") else names


SOURCE = ModelSource(
    prefix="hf",
    help="an image classifier of transformers, by its name on the hub or its folder",
    build=build,
    fields=frozenset({"num_classes", "pretrained"}),
)
