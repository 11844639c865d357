"""Model sources: each builds the nets of one prefix, as `timm:NAME`. Imports no torch.

A file of this folder registers its source as `SOURCE = ModelSource(prefix="...", ...)`; an installed package by an
entry point of the group `robustkit.models`, which names a `ModelSource` or a function `(name, **fields) -> net`.
Lists, spelling hints, fields of queries, training and the loader read nothing but this declaration.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from robustkit.core.errors import UsageError
from robustkit.registry.plugins import Plugin, plugins

if TYPE_CHECKING:
    from robustkit.models.options import Options
    from robustkit.models.sources.built import Built
    from robustkit.models.strings import ModelString
    from robustkit.models.weights.files import WeightsFile

# The declaration is found in the text of a file, which is imported only when its prefix is used.
_DECLARATION = re.compile(r'^SOURCE = ModelSource\(\s*prefix="([\w-]+)",(?:\s*suffix="([\w.]+)",)?', re.MULTILINE)


@dataclass(frozen=True)
class NetFacts:
    """A net of a source that lists its nets.

    Attributes:
        input: Channels, height and width of the images it was designed for.
        num_classes: Classes unless the query or the weights say otherwise.
        description: One line for `robustkit list models`.
    """

    input: tuple[int, int, int]
    num_classes: int
    description: str


def _no_weights(spec: ModelString) -> WeightsFile | None:
    return None


def _no_facts(name: str) -> NetFacts | None:
    return None


@dataclass(frozen=True)
class ModelSource:
    """Builds the nets whose model strings begin with its prefix.

    Attributes:
        prefix: The word before the colon, with hyphens.
        help: One line for `robustkit list models`.
        suffix: How the files end that are models of this source, such as `.onnx`; a path that ends so is a model
            string without the prefix, and what follows the prefix is a path, which may contain an `@`. Empty for a
            source of names.
        build: Returns the net of a model string, with as many classes as its options and its weights file need;
            the loader puts the weights into the net. It is called with torch's generator seeded, which is restored
            afterwards, so initial weights are reproducible without code of its own. Heavy imports belong inside.
        fields: Which of the fields `num_classes`, `in_channels` and `pretrained` a query may have; any other field
            is then an error. None accepts every field and passes them to `build` as `options.keywords`.
        placeholder: What follows the colon, for lists and error messages, such as SEED.
        own_weights: Returns the weights file that comes with a net; used unless the string names one or has
            `pretrained=false`.
        nets: The nets that are listed one by one, by name; empty for a source that does not list them.
        facts: Returns the facts of one net, which training needs to fit classes and channels to the data; None
            where they are unknown.
        names: Returns the names of its nets for spelling hints; may take seconds.
        runs_code: Whether its strings can name code that it runs, such as that of a repository; one that a file
            names then needs `--trust-code`.
    """

    prefix: str
    help: str
    build: Callable[[ModelString, Options, WeightsFile | None], Built]
    fields: frozenset[str] | None = None
    own_weights: Callable[[ModelString], WeightsFile | None] = _no_weights
    nets: Mapping[str, NetFacts] = field(default_factory=dict)
    facts: Callable[[str], NetFacts | None] = _no_facts
    names: Callable[[], Iterable[str]] = tuple
    runs_code: bool = False
    placeholder: str = "NAME"
    suffix: str = ""

    def takes(self, name: str) -> bool:
        """Return whether its queries have this field beside those of every model."""
        return self.fields is not None and name in self.fields


@functools.cache
def _own_modules() -> Mapping[str, str]:
    """Return the modules of robustkit's own sources by their prefixes."""
    return {prefix: module for prefix, module, _ in _declarations()}


@functools.cache
def _declarations() -> list[tuple[str, str, str]]:
    """Return prefix, module and suffix of robustkit's own sources."""
    found = []
    for file in sorted(Path(__file__).parent.glob("*.py")):
        declaration = _DECLARATION.search(file.read_text(encoding="utf-8"))
        if declaration:
            found.append((declaration[1], f"{__package__}.{file.stem}", declaration[2] or ""))
    return found


def is_prefix(text: str) -> bool:
    """Return whether a model source has this prefix, without importing it."""
    return text in _own_modules() or text in plugins("models")


def is_own(prefix: str) -> bool:
    """Return whether the source of a prefix is robustkit's own, not that of an installed package."""
    return prefix in _own_modules()


def takes_files(prefix: str) -> bool:
    """Return whether a path of a file follows a prefix."""
    return any(prefix == own and suffix for own, _, suffix in _declarations())


def prefix_for_file(path: str) -> str | None:
    """Return the prefix of the source whose files end as this path does; None if there is none."""
    return next((own for own, _, suffix in _declarations() if suffix and path.lower().endswith(suffix)), None)


def own_sources() -> Iterator[ModelSource]:
    """Yield robustkit's own sources."""
    yield from map(find_source, _own_modules())


def find_source(prefix: str) -> ModelSource:
    """Return the source of a prefix; one of an installed package does not replace robustkit's own.

    Raises:
        UsageError: The module of an installed package cannot be imported.
    """
    if prefix in _own_modules():
        source: ModelSource = importlib.import_module(_own_modules()[prefix]).SOURCE
        return source
    plugin = plugins("models")[prefix]
    found = plugin.load()
    if isinstance(found, ModelSource):
        return replace(found, prefix=prefix, build=functools.partial(_recorded, plugin, found))
    return ModelSource(prefix, plugin.summary, functools.partial(_call, plugin))


def _recorded(
    plugin: Plugin, source: ModelSource, spec: ModelString, options: Options, weights: WeightsFile | None
) -> Built:
    """Return what the source of a package builds, identified by its package and code too."""
    built = source.build(spec, options, weights)
    return replace(built, identity={**built.identity, "arch": spec.arch, **plugin.record})


def _call(plugin: Plugin, spec: ModelString, options: Options, weights: WeightsFile | None) -> Built:
    """Return the net of a package's function, called with the name and the other fields of the query."""
    from robustkit.models.sources.built import Built

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
