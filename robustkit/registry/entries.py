"""What is registered, read from the source text of the folders; and the thing itself, by its name."""

from __future__ import annotations

import ast
import functools
import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustkit.core.errors import did_you_mean
from robustkit.core.limits import Limits
from robustkit.core.step_size import StepSize
from robustkit.registry.decorators import Info, registered
from robustkit.registry.ranges import NAMED

# Where the files of a kind are; a method of training is a surrogate's in `attacks` and a defense's in `defenses`.
FOLDERS: dict[str, tuple[str, ...]] = {
    "attack": ("attacks",),
    "technique": ("attacks",),
    "recipe": ("attacks",),
    "suite": ("attacks",),
    "defense": ("defenses",),
    "method": ("attacks", "defenses"),
}

# A decorator of ours with what it decorates, up to the first method or the next thing at the margin.
_HEAD = re.compile(
    rf"^@(?:{'|'.join(FOLDERS)})\(.*?^(?:class|def) .*?(?=^    (?:def |@)|^\S|\Z)", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Field:
    """A field of a registered dataclass, as its source text writes it.

    `default` is empty where it has none, `limits` where its type has none.
    """

    name: str
    type: str
    default: str
    limits: str

    @classmethod
    def read(cls, name: str, annotation: ast.expr, default: ast.expr | None) -> Field:
        """Return the field of a line of a class, its type without the limits, which are given beside it."""
        text, limits = ast.unparse(annotation), None
        for node in ast.walk(annotation):
            if isinstance(node, ast.Call):
                words = {str(word.arg): ast.literal_eval(word.value) for word in node.keywords}
                limits = Limits(*map(ast.literal_eval, node.args), **words)
            elif isinstance(node, ast.Name) and node.id in NAMED:
                limits = NAMED[node.id].__metadata__[0]
                text = text.replace(node.id, NAMED[node.id].__origin__.__name__)
        text = re.sub(r"Annotated\[(\w+), .*?\)\]", r"\1", text)
        if isinstance(default, ast.Call):  # a step size, as a person writes it
            size = StepSize(*map(ast.literal_eval, default.args))
            return cls(name, text, str(size), "with its unit, such as 0.25eps or 2/255px")
        return cls(name, text, "" if default is None else ast.unparse(default), str(limits or ""))


@dataclass(frozen=True)
class Entry:
    """A registered thing as read from its source text: no module is imported for it.

    `summary` is the first line of its docstring, `detail` what follows.
    """

    info: Info
    module: str
    summary: str
    fields: tuple[Field, ...] = ()
    detail: str = ""

    @property
    def form(self) -> str:
        """How a model string writes it, if it is a defense: `NAME:FIELD,FIELD`."""
        return f"{self.info.name}:{','.join(field.name for field in self.fields).upper()}"


@functools.cache
def catalog(kind: str) -> Mapping[str, Entry]:
    """Return every registered name of a kind (a key of `FOLDERS`) with what its source says."""
    entries: dict[str, Entry] = {}
    files = [(folder, *marked) for folder in FOLDERS[kind] for marked in _marked(folder)]
    for folder, module, nodes in files:
        for node in nodes:
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and isinstance(mark.func, ast.Name) and mark.func.id == kind:
                    name = ast.literal_eval(mark.args[0])
                    options = {str(word.arg): ast.literal_eval(word.value) for word in mark.keywords}
                    summary, _, detail = (ast.get_docstring(node) or "").partition("\n")
                    info = Info(kind, name, **options)
                    fields = tuple(
                        Field.read(line.target.id, line.annotation, line.value)
                        for line in node.body
                        if isinstance(line, ast.AnnAssign)
                        and isinstance(line.target, ast.Name)
                        and "ClassVar" not in ast.unparse(line.annotation)
                    )
                    entries[name] = Entry(info, f"robustkit.{folder}.{module}", summary, fields, detail.strip())
    return entries


@functools.cache
def _marked(folder: str) -> list[tuple[str, list[ast.ClassDef | ast.FunctionDef]]]:
    """Return the module of each file below a folder with its registered classes and functions.

    Of each only the head is parsed, up to its first method: lists and help pages wait for all files.
    """
    home = Path(__file__).parents[1] / folder
    return [
        (
            ".".join(file.relative_to(home).with_suffix("").parts),
            [
                node
                for block in _HEAD.findall(file.read_text(encoding="utf-8"))
                for node in ast.parse(block).body
                if isinstance(node, (ast.ClassDef, ast.FunctionDef))
            ],
        )
        for file in sorted(home.rglob("[!_]*.py"))
    ]


def find(kind: str, name: str) -> Any:
    """Return the class or function of that name; UsageError with the nearest name if there is none."""
    known = catalog(kind)
    if name not in known:
        raise did_you_mean(kind, name, known)
    importlib.import_module(known[name].module)
    return registered(kind, name)
