"""Nets of installed packages: `PREFIX:NAME`, where PREFIX is an entry point of the group `robustkit.models`."""

from __future__ import annotations

from dataclasses import replace

from robustkit.core.errors import UsageError
from robustkit.models.options import Options
from robustkit.models.sources.built import Built
from robustkit.models.strings import ModelString
from robustkit.models.weights.files import WeightsFile
from robustkit.registry.plugins import plugins


def build(spec: ModelString, options: Options, weights: WeightsFile | None) -> Built:
    """Return the net that a package's function builds.

    The function is called as `function(NAME, **fields)` with the query's other fields, and returns a callable on
    images, such as a `torch.nn.Module`, or a `Built`, which also has the normalisation and the size of images.

    Raises:
        UsageError: if the function cannot be imported, fails, or returns something else.
    """
    plugin = plugins("models")[spec.source]
    found = plugin.call(spec.name, **options.keywords)
    built = found if isinstance(found, Built) else Built(net=found, arch=spec.arch)
    if not callable(built.net):
        raise UsageError(
            f"{plugin.module}:{plugin.attribute} of the package {plugin.package} returned an object of type "
            f"{type(found).__name__}: return a torch.nn.Module, or a robustkit.models.sources.built.Built."
        )
    number = built.num_classes or options.keywords.get("num_classes") or getattr(built.net, "num_classes", None)
    return replace(
        built,
        identity={**built.identity, "arch": spec.arch, **options.keywords, **plugin.record},
        num_classes=number if isinstance(number, int) else None,
    )
