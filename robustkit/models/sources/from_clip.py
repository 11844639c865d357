"""Zero-shot classifiers: `clip:NAME/TAG?classes=a,b,c` of open_clip, `clip:FOLDER` of transformers.

A class is the text that the template makes of its name; the logits are the scaled cosines of an image and the
texts (Radford et al. 2021, arXiv:2103.00020).
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustkit.core.errors import UsageError, did_you_mean, error_summary, expand_path
from robustkit.models.sources.built import Built
from robustkit.models.sources.network import offline_if_unreachable, quiet
from robustkit.models.sources.source import ModelSource

if TYPE_CHECKING:
    from robustkit.models.options import Options
    from robustkit.models.sources.zero_shot import Towers
    from robustkit.models.strings import ModelString
    from robustkit.models.weights.files import WeightsFile

FIELDS = ("classes", "template", "pretrained")
DEFAULT_TEMPLATE = "a photo of a {}."
_MAX_LISTED = 8


def build(spec: ModelString, options: Options, weights: WeightsFile | None) -> Built:
    """Return the zero-shot classifier of the classes in the query.

    Raises:
        UsageError: A library is missing, or the model is, the query names no classes, or the template has no place
            for them.
    """
    names, template, fields = _texts(spec, options)
    folder = expand_path(spec.name).absolute()
    is_folder = folder.is_dir()
    if not is_folder and spec.name.startswith((".", "/", "~")):
        raise UsageError(f"there is no folder '{folder}' for model {str(spec)!r}: check the path.")
    pretrained = options.keywords.get("pretrained") is not False and weights is None
    with quiet(), offline_if_unreachable(local=is_folder or not pretrained):
        towers = _transformers(spec, folder) if is_folder else _open_clip(spec, pretrained)
    from robustkit.models.sources.image_processor import PreparedImages
    from robustkit.models.sources.zero_shot import ZeroShotNet
    from robustkit.models.weights.loading import put_weights

    if weights is not None:
        put_weights(towers.model, weights, spec.arch, choice=options.weights)
    net = ZeroShotNet(towers, [template.replace("{}", name) for name in names])
    return Built(
        net=PreparedImages(net, towers.settings, lambda net, images: net(images)),
        arch=f"{spec.source}:{folder}" if is_folder else spec.arch,
        identity={
            "arch": spec.source if is_folder else spec.arch,
            "classes": list(names),
            "template": template,
            "images": repr(towers.settings),
        },
        mean=towers.settings.mean,
        std=towers.settings.std,
        num_classes=len(names),
        preprocess=towers.settings.preprocess,
        convert=lambda state: {f"net.model.{name}": value for name, value in state.items()},
        class_names=names,
        fields=fields,
    )


def _texts(spec: ModelString, options: Options) -> tuple[tuple[str, ...], str, dict[str, str]]:
    """Return the names of the classes, the template, and how the field of a file is written for any folder."""
    for field in options.keywords:
        if field not in FIELDS:
            raise did_you_mean(f"field of {spec.source} models", field, FIELDS)
    written, template = (str(options.keywords.get(name, "")) for name in FIELDS[:2])
    path = expand_path(written)
    if written and path.is_file():
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    else:
        names = tuple(part.strip() for part in written.split(",") if part.strip())
    if len(names) < 2:
        raise UsageError(
            f"model {str(spec)!r} names {len(names)} classes: write two or more, as classes=cat,dog, or a file of "
            "one name in each line."
        )
    template = template or DEFAULT_TEMPLATE
    if "{}" not in template:
        raise UsageError(f"template={template[:60]} has no place for the class: write {{}} there.")
    return names, template, {"classes": str(path.absolute())} if path.is_file() else {}


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"it has {len(known)}"


def _open_clip(spec: ModelString, pretrained: bool) -> Towers:
    try:
        import open_clip
    except ImportError as error:
        raise UsageError(
            f"model {str(spec)!r} needs open_clip: pip install open_clip_torch, then load it again."
        ) from error
    from robustkit.models.sources.zero_shot import open_clip_towers

    name, tag = spec.name, None
    if not name.startswith("hf-hub:"):
        name, _, tag = spec.name.partition("/")
        if name not in open_clip.list_models():
            raise UsageError(f"open_clip has no model {name!r}: {_near(name, open_clip.list_models())}.")
        tags = open_clip.list_pretrained_tags_by_model(name)
        if pretrained and tag not in tags:
            known = ", ".join(f"{name}/{one}" for one in tags[:_MAX_LISTED])
            what = f"has no weights {tag!r}" if tag else "is written without the weights that are meant"
            raise UsageError(
                f"open_clip's model {name!r} {what}: {_near(tag, tags)}; write one of {known}, or @FILE."
            )
        tag = tag if pretrained else None
    try:
        return open_clip_towers(open_clip, name, tag, pretrained)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise UsageError(
            f"open_clip does not load {spec.arch!r} ({error_summary(error):.200}): check the name and network, "
            "or write its weights as @FILE."
        ) from error


def _transformers(spec: ModelString, folder: Path) -> Towers:
    from robustkit.models.sources.from_hf import library, unavailable
    from robustkit.models.sources.zero_shot import transformers_towers

    transformers: Any = library(spec)
    try:
        return transformers_towers(transformers, str(folder))
    except (OSError, RuntimeError, ValueError, KeyError, AttributeError) as error:
        raise unavailable(f"{spec.source}:{folder}", "CLIP model", error) from error


SOURCE = ModelSource(
    prefix="clip",
    help="a zero-shot classifier of open_clip, or of a folder of transformers, with ?classes=",
    build=build,
    placeholder="NAME/TAG?classes=A,B,C",
)
