"""Installed packages that add names to robustkit, by entry points of the groups below. Imports no torch.

    [project.entry-points."robustkit.attacks"]
    bim = "package.module:BIM"

The files `entry_points.txt` of the installed packages are read directly: `importlib.metadata` takes 0.14 s for the
same on 115 packages (0.09 s to import it), which is half of what `robustkit --help` may take; this takes 0.002 s.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustkit.core.errors import RobustkitError, UsageError, error_summary
from robustkit.registry.fields import hyphenated
from robustkit.registry.imports import own_imports_of_module

GROUPS = ("attacks", "defenses", "models", "data")
_METADATA = (".dist-info", ".egg-info")


@dataclass(frozen=True)
class Plugin:
    """One entry point of an installed package.

    Attributes:
        group: one of `GROUPS`.
        name: its name in strings.
        module: the module that defines it.
        attribute: its name there.
        package: the name and version of the package, such as `stranger 1.2`.
    """

    group: str
    name: str
    module: str
    attribute: str
    package: str

    def load(self) -> Any:
        """Import it.

        Raises:
            UsageError: if its name has an underscore, or its module cannot be imported or has no such attribute.
        """
        hyphenated(self.name, f"the package {self.package}")
        try:
            return getattr(importlib.import_module(self.module), self.attribute)
        except (Exception, SystemExit) as error:
            raise UsageError(
                f"{self.name!r} of the package {self.package} cannot be imported ({error_summary(error)}): "
                "correct or uninstall that package."
            ) from error

    def call(self, *values: Any, **fields: Any) -> Any:
        """Import it and call it.

        Raises:
            UsageError: if it cannot be imported, or fails.
        """
        function = self.load()
        try:
            return function(*values, **fields)
        except RobustkitError:
            raise
        except (Exception, SystemExit) as error:
            given = ", ".join([*map(repr, values), *(f"{name}={value!r}" for name, value in fields.items())])
            raise UsageError(
                f"{self.module}:{self.attribute} of the package {self.package} failed with {error_summary(error)} "
                f"for {given}: check the name and the fields."
            ) from error

    @property
    def file(self) -> Path | None:
        """The file of its module, found without importing anything; None if there is none."""
        top, *rest = self.module.split(".")
        spec = importlib.util.find_spec(top)
        if spec is None:
            return None
        if not rest:
            return Path(spec.origin) if spec.origin else None
        for folder in spec.submodule_search_locations or ():
            place = Path(folder).joinpath(*rest)
            for file in (place.with_suffix(".py"), place / "__init__.py"):
                if file.is_file():
                    return file
        return None

    @functools.cached_property
    def summary(self) -> str:
        """The first line of its docstring, or the `help=` of its declaration, read from its text; else empty."""
        try:
            tree = ast.parse(self.file.read_bytes() if self.file else b"")
        except (OSError, SyntaxError, ValueError):
            return ""
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == self.attribute:
                return (ast.get_docstring(node) or "").partition("\n")[0]
            if isinstance(node, ast.Assign) and self.attribute in map(ast.unparse, node.targets):
                for word in getattr(node.value, "keywords", ()):
                    if word.arg == "help" and isinstance(word.value, ast.Constant):
                        return str(word.value.value)
        return ""

    @functools.cached_property
    def record(self) -> dict[str, str]:
        """The keys that identify it in a run's record: the package, and the SHA-256 of its code."""
        file = self.file
        if file is None:
            return {"package": self.package}
        digest = hashlib.sha256(file.read_bytes())
        for name, other in sorted(own_imports_of_module(self.module, file).items()):
            digest.update(f"\n{name} {hashlib.sha256(other.read_bytes()).hexdigest()}".encode())
        return {"package": self.package, "code": digest.hexdigest()}


def plugins(group: str) -> Mapping[str, Plugin]:
    """Return the entry points of a group by their names; of two packages with one name, the first on the path."""
    return {plugin.name: plugin for plugin in reversed(_scan(tuple(sys.path))) if plugin.group == group}


@functools.lru_cache(maxsize=4)
def _scan(path: tuple[str, ...]) -> list[Plugin]:
    """Return all entry points of our groups on a path; of two versions of a package, those of the first."""
    plugins_found: list[Plugin] = []
    packages: set[str] = set()
    for folder in dict.fromkeys(path):
        try:
            names = sorted(entry.path for entry in os.scandir(folder or ".") if entry.name.endswith(_METADATA))
        except OSError:
            continue
        for place in names:
            try:
                text = (Path(place) / "entry_points.txt").read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if "[robustkit." not in text:
                continue
            package = _package(Path(place))
            if package.partition(" ")[0] not in packages:
                packages.add(package.partition(" ")[0])
                plugins_found += _parse(text, package)
    return plugins_found


def _package(place: Path) -> str:
    """Return a package's name and version, from its metadata."""
    facts: dict[str, str] = {}
    for file in ("METADATA", "PKG-INFO"):
        try:
            lines = (place / file).read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
        except (OSError, UnicodeDecodeError):
            continue
        facts |= {key: value for key, _, value in (line.partition(": ") for line in lines)}
    name, _, version = place.stem.partition("-")
    return f"{facts.get('Name', name)} {facts.get('Version', version)}".strip()


def _parse(text: str, package: str) -> Iterator[Plugin]:
    """Yield the entry points of our groups in an `entry_points.txt`."""
    group = ""
    for line in map(str.strip, text.splitlines()):
        if line.startswith("["):
            group = line.strip("[]").strip().removeprefix("robustkit.") if line.startswith("[robustkit.") else ""
        elif group in GROUPS and "=" in line and not line.startswith("#"):
            name, _, target = (part.strip() for part in line.partition("="))
            module, _, attribute = target.partition("[")[0].strip().partition(":")
            yield Plugin(group, name, module, attribute, package)
