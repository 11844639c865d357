"""The entries that a Python file registers, read from its text: lists and help pages import no module."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from robustkit.core.limits import Limits
from robustkit.core.step_size import StepSize
from robustkit.registry.decorators import KINDS, Info
from robustkit.registry.fields import plain_types, range_of
from robustkit.registry.ranges import NAMED

# A decorator of robustkit with the head of its class or function, up to the first method or the next top-level
# statement: lists and help pages parse only these heads.
_HEAD = re.compile(
    rf"^@(?:{'|'.join(KINDS)})\(.*?^(?:class|def) .*?(?=^    (?:def |@)|^\S|\Z)", re.MULTILINE | re.DOTALL
)

_WITH_UNIT = "with its unit, such as 0.25eps or 2/255px"


@dataclass(frozen=True)
class Field:
    """A field of a registered dataclass, as its source text writes it.

    Attributes:
        name: its name.
        type: its annotation, without limits.
        default: its default value; empty if it has none.
        limits: which numbers it may have, in words; empty where its type has no limits.
    """

    name: str
    type: str
    default: str
    limits: str

    @classmethod
    def read(cls, name: str, annotation: ast.expr, default: ast.expr | None) -> Field:
        """Return the field of an annotated line of a class."""
        text, limits = ast.unparse(annotation), None
        for node in ast.walk(annotation):
            if isinstance(node, ast.Call):
                keywords = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
                limits = Limits(*map(ast.literal_eval, node.args), **keywords)
            elif isinstance(node, ast.Name) and node.id in NAMED:
                limits = NAMED[node.id].__metadata__[0]
                text = text.replace(node.id, NAMED[node.id].__origin__.__name__)
        text = re.sub(r"Annotated\[(\w+), .*?\)\]", r"\1", text)
        if isinstance(default, ast.Call):  # a step size, which users write with its unit
            size = StepSize(*map(ast.literal_eval, default.args))
            return cls(name, text, str(size), _WITH_UNIT)
        return cls(name, text, "" if default is None else ast.unparse(default), str(limits or ""))

    @classmethod
    def of(cls, field: dataclasses.Field[Any], annotation: Any) -> Field:
        """Return the field of an imported class, by its annotated type."""
        types = [getattr(kind, "__name__", str(kind)) for kind in plain_types(annotation)]
        text = " | ".join(types).replace("NoneType", "None")
        default = field.default
        if isinstance(default, StepSize):
            return cls(field.name, text, str(default), _WITH_UNIT)
        shown = "" if default is dataclasses.MISSING else repr(default)
        return cls(field.name, text, shown, str(range_of(annotation) or ""))


@dataclass(frozen=True)
class Entry:
    """A registered class or function as its source text describes it.

    Attributes:
        info: the arguments of its decorator.
        module: the module that defines it.
        attribute: its name in that module.
        summary: the first line of its docstring.
        fields: those of a dataclass, in order.
        detail: the rest of the docstring.
        package: name and version of the installed package that it comes from; empty for robustkit's own.
        reference: `FILE.py:NAME`, if the user gave that.
    """

    info: Info
    module: str
    attribute: str
    summary: str
    fields: tuple[Field, ...] = ()
    detail: str = ""
    package: str = ""
    reference: str = ""

    @property
    def form(self) -> str:
        """Its form in a model string, if it is a defense: `NAME:FIELD,FIELD`."""
        return f"{self.info.name}:{','.join(field.name for field in self.fields).upper()}"


def read_entries(text: str, module: str, text_of: Callable[[str], str] = lambda module: "") -> Iterator[Entry]:
    """Yield an entry for each decorator of the registry in a file's text.

    Args:
        text: the file's.
        module: its dotted name.
        text_of: returns the text of a module that a base class is imported from; empty where that is not read.

    Raises:
        ValueError: if an argument of a decorator is no literal.
        SyntaxError: if a registered class or function is no Python.
    """
    for head in _HEAD.findall(text):
        for node in ast.parse(head).body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef):
                continue
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and isinstance(mark.func, ast.Name) and mark.func.id in KINDS:
                    yield _entry(node, mark, mark.func.id, module, _fields(node, text, text_of))


def _entry(
    node: ast.ClassDef | ast.FunctionDef, mark: ast.Call, kind: str, module: str, fields: Iterable[Field]
) -> Entry:
    summary, _, detail = (ast.get_docstring(node) or "").partition("\n")
    options = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in mark.keywords}
    info = Info(kind, ast.literal_eval(mark.args[0]), **options)
    return Entry(info, module, node.name, summary, tuple(fields), detail.strip())


def _fields(node: ast.ClassDef | ast.FunctionDef, text: str, text_of: Callable[[str], str]) -> Iterable[Field]:
    """Return the fields of a class in the order that a dataclass gives them: those of its bases first."""
    fields: dict[str, Field] = {}
    for base in reversed(node.bases) if isinstance(node, ast.ClassDef) else ():
        inherited = _class_of(base.id, text, text_of) if isinstance(base, ast.Name) else None
        if inherited is not None:
            fields |= {field.name: field for field in _fields(*inherited, text_of)}
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            if "ClassVar" not in ast.unparse(line.annotation):
                fields[line.target.id] = Field.read(line.target.id, line.annotation, line.value)
    return fields.values()


def _class_of(name: str, text: str, text_of: Callable[[str], str]) -> tuple[ast.ClassDef, str] | None:
    """Return the head of a dataclass, in this text or in a module that it is imported from, with that text."""
    head = re.search(
        rf"(?<=\n)@dataclass[^\n]*\nclass {name}\b.*?(?=^    (?:def |@)|^\S|\Z)", text, re.MULTILINE | re.DOTALL
    )
    if head:
        (node,) = ast.parse(head[0]).body
        return (node, text) if isinstance(node, ast.ClassDef) else None
    imported = re.search(rf"^from (\S+) import (?:\([^)]*|[^\n]*)\b{name}\b", text, re.MULTILINE)
    return _class_of(name, there, text_of) if imported and (there := text_of(imported[1])) else None
