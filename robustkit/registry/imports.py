"""The files of its own folder or package that a model's code imports, found in their text without running them."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

# Folders of installed packages: modules in the same folder there are independent.
_INSTALLED = ("site-packages", "dist-packages")


def own_imports(start: Path, root: Path, module: str = "", within: str = "") -> dict[str, Path]:
    """Return the modules that a file imports, and those that these import, with their files.

    Modules of other folders, installed ones among them, are left out, and so is the file itself.

    Args:
        start: the file.
        root: the folder from which the names of modules are looked up.
        module: the file's own name as a module, for relative imports.
        within: a package to search; empty for the whole folder.
    """
    files: dict[str, Path] = {}
    waiting = [(module, start)]
    while waiting:
        name, file = waiting.pop()
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        for imported in _imported(file, package):
            parts = imported.split(".")
            if within and parts[0] != within:
                continue
            # Importing a.b runs a first.
            for count in range(1, len(parts) + 1):
                whole, place = ".".join(parts[:count]), _located(root.joinpath(*parts[:count]))
                if place is not None and place != start and whole not in files:
                    files[whole] = place
                    waiting.append((whole, place))
    return files


def own_imports_of_module(name: str, file: Path) -> dict[str, Path]:
    """Return the same for an imported module: those of its package, or of its folder if it is in none."""
    top, dot, _ = name.partition(".")
    is_package = file.name == "__init__.py"
    root = file.parents[name.count(".") + is_package]
    if not dot and not is_package:
        return {} if any(part in _INSTALLED for part in file.parts) else own_imports(file, root, name)
    return own_imports(file, root, name, top)


def _imported(file: Path, package: str) -> tuple[str, ...]:
    """Return the names that a file imports anywhere in its text; each may be a module or something in one."""
    try:
        return _imported_in(file.read_bytes(), package)
    except (OSError, SyntaxError, ValueError, RecursionError):  # reported when the file is run
        return ()


# Every load of a net by code, as of each sample of a run folder, looks through the same files.
@functools.lru_cache(maxsize=1024)
def _imported_in(text: bytes, package: str) -> tuple[str, ...]:
    return tuple(_imports(ast.parse(text), package))


def _imports(tree: ast.Module, package: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = [*filter(None, above), *([node.module] if node.module else [])]
            yield from (".".join([*base, *([] if name.name == "*" else [name.name])]) for name in node.names)
        elif isinstance(node, ast.Call) and _is_import(node.func) and node.args:
            (name, *_) = node.args
            if isinstance(name, ast.Constant) and isinstance(name.value, str) and _is_name(name.value):
                yield name.value


def _is_import(function: ast.expr) -> bool:
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", None)
    return name in ("import_module", "__import__")


def _is_name(text: str) -> bool:
    return all(part.isidentifier() for part in text.split("."))


def _located(path: Path) -> Path | None:
    """Return the file of a module or package at this path without its ending, None if there is none."""
    files = (path / "__init__.py", path.with_name(f"{path.name}.py"))
    return next((file for file in files if file.is_file()), None)
