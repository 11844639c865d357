"""Nets of timm on the Hugging Face hub: `hf-hub:OWNER/NAME`, which is `timm:hf-hub:OWNER/NAME`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from robustkit.models.sources.source import ModelSource

if TYPE_CHECKING:
    from robustkit.models.options import Options
    from robustkit.models.sources.built import Built
    from robustkit.models.strings import ModelString
    from robustkit.models.weights.files import WeightsFile


def build(spec: ModelString, options: Options, weights: WeightsFile | None) -> Built:
    """Return a net of timm with the configuration and weights of a repository of the hub.

    Raises:
        UsageError: The repository is not there, is none of timm, or could not be downloaded.
    """
    from robustkit.models.sources.from_timm import build as build_timm

    return build_timm(replace(spec, arch=f"timm:{spec.arch}"), options, weights)


SOURCE = ModelSource(
    prefix="hf-hub",
    help="a timm net of the Hugging Face hub, by OWNER/NAME",
    build=build,
    fields=frozenset({"num_classes", "pretrained"}),
    placeholder="OWNER/NAME",
)
