"""Everything that is registered, by kind and name: robustkit's own files, and those of installed packages."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from robustkit.core.errors import UsageError, did_you_mean
from robustkit.registry.code_files import is_reference, load_reference
from robustkit.registry.decorators import KINDS
from robustkit.registry.fields import field_types
from robustkit.registry.functions import FunctionAttack, is_plain_function
from robustkit.registry.plugins import Plugin, plugins
from robustkit.registry.source_text import Entry, Field, read_entries

__all__ = ["FOLDERS", "Entry", "Field", "catalog", "describe", "find"]

# The folders of each kind; training methods for surrogates are in `attacks`, those for defenses in `defenses`.
FOLDERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(KINDS, ("attacks",)),
    "defense": ("defenses",),
    "method": ("attacks", "defenses"),
}


def _home(folder: str) -> Path:
    """Return the folder of attacks or defenses: in the package, else in a checkout without links beside it."""
    package = Path(__file__).parents[1]
    return package / folder if (package / folder).is_dir() else package.parent / folder


@functools.cache
def _own(folder: str) -> tuple[Entry, ...]:
    """Return what the files below a folder of robustkit register."""
    home = _home(folder)
    return tuple(
        entry
        for file in sorted(home.rglob("[!_]*.py"), key=lambda file: file.stem)
        for entry in read_entries(
            file.read_text(encoding="utf-8"),
            ".".join(("robustkit", folder, *file.relative_to(home).with_suffix("").parts)),
            _plugin_text,
        )
    )


@functools.cache
def _plugin_text(module: str) -> str:
    """Return the text of a module of attacks or defenses, empty for others: their classes have no fields."""
    parts = module.split(".")
    if parts[1:2] not in (["attacks"], ["defenses"]):
        return ""
    return _home(parts[1]).joinpath(*parts[2:]).with_suffix(".py").read_text(encoding="utf-8")


def catalog(kind: str) -> Mapping[str, Entry]:
    """Return every registered name of a kind (a key of `FOLDERS`) with its entry.

    A name of robustkit's own is not replaced by that of an installed package.
    """
    return _catalog(kind, tuple(sys.path))


@functools.lru_cache(maxsize=32)
def _catalog(kind: str, path: tuple[str, ...]) -> Mapping[str, Entry]:
    own = [entry for folder in FOLDERS[kind] for entry in _own(folder)]
    installed = [entry for folder in FOLDERS[kind] for entry in _installed(folder)]
    known = {entry.info.name: entry for entry in own if entry.info.kind == kind}
    return known | {
        entry.info.name: entry for entry in installed if entry.info.kind == kind and entry.info.name not in known
    }


def _installed(group: str) -> Iterator[Entry]:
    """Yield the entries of installed packages; one without a decorator is an attack given as a function."""
    for plugin in plugins(group).values():
        yield _plugin_entry(plugin)


@functools.cache
def _plugin_entry(plugin: Plugin) -> Entry:
    entry = None
    try:
        text = plugin.file.read_text(encoding="utf-8") if plugin.file else ""
        entry = next((one for one in read_entries(text, plugin.module) if one.attribute == plugin.attribute), None)
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError, IndexError, TypeError):
        pass  # `find` reports the error when the name is used
    entry = entry or Entry(FunctionAttack.info, plugin.module, plugin.attribute, plugin.summary)
    return replace(entry, info=replace(entry.info, name=plugin.name), package=plugin.package)


def find(kind: str, name: str) -> Any:
    """Return the registered class or function of a name, or of `FILE.py:NAME`, whose file is run.

    Raises:
        UsageError: if there is none, with the nearest name; or if a file or package has none of this kind.
    """
    if is_reference(name):
        return _of_kind(kind, load_reference(name), name)
    known = catalog(kind)
    if name not in known:
        raise did_you_mean(kind, name, known)
    entry = known[name]
    if not entry.package:
        return getattr(importlib.import_module(entry.module), entry.attribute)
    plugin = next(plugins(folder)[name] for folder in FOLDERS[kind] if name in plugins(folder))
    registered = _of_kind(kind, plugin.load(), f"{plugin.module}:{plugin.attribute}")
    if not is_plain_function(registered) and registered.info.name != name:
        raise UsageError(
            f"the package {plugin.package} calls {plugin.module}:{plugin.attribute} {name!r} in its entry points "
            f"and {registered.info.name!r} in its decorator: give it one name."
        )
    return registered


def describe(kind: str, name: str) -> Entry:
    """Return the entry of a registered name, or of `FILE.py:NAME`, whose file is run.

    Raises:
        UsageError: as for `find`.
    """
    if not is_reference(name):
        known = catalog(kind)
        if name not in known:
            raise did_you_mean(kind, name, known)
        return known[name]
    registered = find(kind, name)
    summary, _, detail = (inspect.getdoc(registered) or "").partition("\n")
    info = getattr(registered, "info", FunctionAttack.info)
    entry = Entry(info, registered.__module__, registered.__name__, summary, detail=detail.strip(), reference=name)
    if not dataclasses.is_dataclass(registered):
        return entry
    types: Mapping[str, Any] = field_types(registered)  # type: ignore[arg-type]
    fields = tuple(Field.of(field, types[field.name]) for field in dataclasses.fields(registered) if field.init)
    return replace(entry, fields=fields)


def _of_kind(kind: str, registered: Any, name: str) -> Any:
    """Return a class or function of a file or package if it has the required kind."""
    info = getattr(registered, "info", None)
    if getattr(info, "kind", None) == kind or (kind == "attack" and is_plain_function(registered)):
        return registered
    known = f"is a {info.kind}" if info is not None else "is not registered"
    raise UsageError(
        f"{name} {known}, not {'an' if kind == 'attack' else 'a'} {kind}: put @{kind}(...) of robustkit.registry "
        "above its class."
    )
