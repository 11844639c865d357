"""Attacks, techniques, recipes, defenses, methods and suites by name, found by walking the folders.

Imports no torch.

A file registers names made of its own stem: `fab.py` may hold `fab` and `fab-t`, `mi_fgsm.py` holds `mi-fgsm`,
`autoattack.py` holds `autoattack:apgd-ce`, `rapid.py` holds `rapid+autoattack`. A recipe may end in the stem
instead, as papers name theirs: `cwa.py` holds `ssa-cwa`. So one name imports one module, and lists, help pages
and spelling hints are read from the source text without importing any.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from robustkit.errors import UsageError, did_you_mean
from robustkit.record import stage_name

T = TypeVar("T")

# Fields that count something and start at 1.
COUNTS = (
    *("steps", "restarts", "queries", "targets", "eot_iter", "probe", "finalists", "patience"),
    *("copies", "scales", "mixes", "blocks", "rounds", "kernel"),
    *("cycles", "samples"),
)
# Fields that are lengths, or shares of what was before: below 0 an attack would go backwards.
LENGTHS = ("step_size", "momentum", "inner_momentum", "beta", "beta_raw", "reverse", "radius", "sigma")
DEFAULT_SUITE = "auto"
# What a model's gradients may be replaced by (`robustkit.models.views`), in the order of what they promise.
VIEWS = (
    "own",
    "mended",
    "loosened",
    "inner-logits",
    "calm",
    "averaged",
    "mean-logit",
    "mean-log-probability",
    "top-k",
    "soft-top-k",
    "straight-through",
    "members",
    "stack",
    "frozen",
    "smooth",
)
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
class Info:
    """What a registered thing says of itself.

    `coupled` marks an attack whose random numbers depend on the batch it is run in. `family` marks a class
    that answers to every name `NAME:ANYTHING`, by its class method `member(tail, **fields)`. `ascent` marks an
    attack that reads nothing but gradients, so that techniques can change them (`robustkit.transfer`).
    """

    kind: str
    name: str
    paper: str = ""
    norms: tuple[str, ...] = ()
    access: str = ""
    coupled: bool = False
    family: bool = False
    ascent: bool = False


@dataclass(frozen=True)
class Field:
    """A field of a registered dataclass, as its source text writes it; `default` is empty where it has none."""

    name: str
    type: str
    default: str


@dataclass(frozen=True)
class Entry:
    """A registered thing as read from its source text: no module is imported for it."""

    info: Info
    module: str
    summary: str
    fields: tuple[Field, ...] = ()
    details: str = ""

    @property
    def form(self) -> str:
        """How a model string writes it, if it is a defense: `NAME:FIELD,FIELD`."""
        return f"{self.info.name}:{','.join(field.name for field in self.fields).upper()}"


@dataclass(frozen=True)
class Rung:
    """An attack of a suite and the view of the model whose gradients it climbs; without one, the model's own.

    Whatever the view, what counts is the model as it is. A `spare` one is run only where the number is in doubt.
    """

    attack: Any
    view: str = ""
    spare: bool = False

    @property
    def spec(self) -> dict[str, Any]:
        """The attack's record, with what else is said of it."""
        more = {"view": self.view, "spare": self.spare}
        return spec(self.attack) | {name: value for name, value in more.items() if value}

    @property
    def name(self) -> str:
        """How a suite writes it, without fields."""
        return stage_name(self.spec)


_registered: dict[tuple[str, str], Any] = {}


def attack(
    name: str,
    *,
    paper: str,
    norms: tuple[str, ...],
    access: str,
    coupled: bool = False,
    family: bool = False,
    ascent: bool = False,
) -> Callable[[type[T]], type[T]]:
    """Register a frozen dataclass as an attack. All arguments must be literals.

    Args:
        name: the file's stem, or `stem-…` or `stem:…`.
        paper: the source, e.g. `arXiv:1706.06083`.
        norms: of the threats it can be run in.
        access: what it needs of the model: `gradient`, `score`, `decision` or `any`.
        coupled: see `Info`.
        family: see `Info`.
        ascent: see `Info`.
    """
    return _register(Info("attack", name, paper, norms, access, coupled, family, ascent))


def technique(name: str, *, paper: str = "") -> Callable[[type[T]], type[T]]:
    """Register a frozen dataclass, a `robustkit.transfer.Technique`, that changes an attack's gradients."""
    return _register(Info("technique", name, paper))


def recipe(name: str, *, paper: str = "") -> Callable[[T], T]:
    """Register a function `() -> attack string` as a name for an attack with its techniques."""
    return _register(Info("recipe", name, paper))


def suite(name: str, *, paper: str = "") -> Callable[[T], T]:
    """Register a function `(norm) -> list of attack strings` as a suite."""
    return _register(Info("suite", name, paper))


def defense(name: str, *, paper: str) -> Callable[[type[T]], type[T]]:
    """Register a frozen dataclass as a defense: a call `(model, x) -> logits` that stands in front of a model.

    Its fields, in order, are what a model string writes after its name. All arguments must be literals.
    """
    return _register(Info("defense", name, paper))


def method(name: str, *, paper: str = "") -> Callable[[type[T]], type[T]]:
    """Register a frozen dataclass, a `robustkit.method.Method`, as a method of training.

    Its fields become flags of `robustkit train NAME`. All arguments must be literals.
    """
    return _register(Info("method", name, paper))


def _register(info: Info) -> Callable[[T], T]:
    def decorate(thing: T) -> T:
        _registered[info.kind, info.name] = thing
        thing.info = info  # type: ignore[attr-defined]
        return thing

    return decorate


@functools.cache
def catalog(kind: str) -> Mapping[str, Entry]:
    """Return every registered name of a kind (a key of `FOLDERS`) with what its source says."""
    entries: dict[str, Entry] = {}
    files = [(folder, *marked) for folder in FOLDERS[kind] for marked in _marked(folder)]
    for folder, stem, nodes in files:
        for node in nodes:
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and isinstance(mark.func, ast.Name) and mark.func.id == kind:
                    name = ast.literal_eval(mark.args[0])
                    options = {str(word.arg): ast.literal_eval(word.value) for word in mark.keywords}
                    summary, _, details = (ast.get_docstring(node) or "").partition("\n")
                    info = Info(kind, name, **options)
                    fields = tuple(
                        Field(
                            line.target.id,
                            ast.unparse(line.annotation),
                            "" if line.value is None else ast.unparse(line.value),
                        )
                        for line in node.body
                        if isinstance(line, ast.AnnAssign)
                        and isinstance(line.target, ast.Name)
                        and "ClassVar" not in ast.unparse(line.annotation)
                    )
                    module = f"robustkit.{folder}.{stem}"
                    entries[name] = Entry(info, module, summary, fields, details.strip())
    return entries


@functools.cache
def _marked(folder: str) -> list[tuple[str, list[ast.ClassDef | ast.FunctionDef]]]:
    """Return the stem of each file of a folder with its registered classes and functions.

    Of each only the head is parsed, up to its first method: lists and help pages wait for all files.
    """
    return [
        (
            file.stem,
            [
                node
                for block in _HEAD.findall(file.read_text(encoding="utf-8"))
                for node in ast.parse(block).body
                if isinstance(node, (ast.ClassDef, ast.FunctionDef))
            ],
        )
        for file in sorted((Path(__file__).parent / folder).glob("[!_]*.py"))
    ]


def find(kind: str, name: str) -> Any:
    """Return the class or function of that name; UsageError with the nearest name if there is none."""
    known = catalog(kind)
    if name not in known:
        raise did_you_mean(kind, name, known)
    importlib.import_module(known[name].module)
    return _registered[kind, name]


def make(name: str, **fields: Any) -> Any:
    """Return the attack `name` with these fields, converted from text to their types where needed.

    Raises:
        UsageError: for an unknown name or field, or a value of the wrong type.
    """
    head, _, tail = name.partition(":")
    entry = catalog("attack").get(head)
    if tail and entry and entry.info.family:
        return find("attack", head).member(tail, **{key: _literal(value) for key, value in fields.items()})
    if entry and entry.info.family:
        raise UsageError(f"attack {name!r} is a family; write {head}:NAME or {head}:NAME(field=value,...).")
    return _build("attack", name, fields)


def make_technique(name: str, **fields: Any) -> Any:
    """Return the technique `name` with these fields; see `make`."""
    return _build("technique", name, fields)


def make_method(name: str, **fields: Any) -> Any:
    """Return the method of training `name` with these fields; see `make`."""
    return _build("method", name, fields)


def _build(kind: str, name: str, fields: Mapping[str, Any]) -> Any:
    thing = find(kind, name)
    hints = get_type_hints(thing)
    types = {field.name: hints[field.name] for field in dataclasses.fields(thing)}
    for field in fields:
        if field not in types:
            raise did_you_mean(f"field of {name}", field, types)
    values = {field: _convert(name, field, value, types[field]) for field, value in fields.items()}
    for field in COUNTS:
        if values.get(field) is not None and values[field] < 1:
            raise UsageError(f"{name}: {field}={values[field]} must be at least 1.")
    for field in () if kind == "method" else LENGTHS:
        if isinstance(values.get(field), float) and values[field] < 0:
            raise UsageError(f"{name}: {field}={values[field]:g} must not be negative.")
    return thing(**values)


def spec(value: Any) -> dict[str, Any]:
    """Return an attack as a record that `make(**record)` turns back into it; a defense as one like it."""
    fields = value.fields() if value.info.family else dataclasses.asdict(value)
    return {"name": getattr(value, "name", value.info.name), **fields}


def parse_suite(text: str, norm: str) -> list[Rung]:
    """Return the attacks of a comma-separated list of suites and attacks, in order.

    `ATTACK@VIEW` climbs the gradients of a view of the model (see `robustkit.models.views`); a model that has
    none of that name is spared it. `ATTACK?` and `ATTACK@VIEW?` are for runs whose number is in doubt.

    Raises:
        UsageError: for an unknown name or field, a bad value, an empty list, or an attack that is not
            defined in this norm.
    """
    rungs: list[Rung] = []
    for part in _split(text):
        name, fields = _parse_call(part.rstrip("?").partition("@")[0], whole=part)
        if name not in catalog("suite"):
            rungs.append(_rung(part))
        elif fields or "@" in part or "?" in part:
            raise UsageError(f"suite {name!r} takes no fields and no view; list its attacks to change them.")
        else:
            rungs += map(_rung, find("suite", name)(norm))
    for rung in rungs:
        _check_norm(rung.attack, norm)
    return rungs


def _rung(text: str) -> Rung:
    """Return the rung of `NAME(field=value,...)@VIEW?`."""
    call, *views = _cut(text.removesuffix("?"), "@")
    name, fields = _parse_call(call, whole=text)
    if name not in catalog("attack") and ":" not in name:
        raise did_you_mean("suite or attack", name, [*catalog("suite"), *catalog("attack")])
    if views and (len(views) > 1 or views[0] not in VIEWS):
        raise did_you_mean("view", "@".join(views), VIEWS)
    return Rung(make(name, **fields), "".join(views), text.endswith("?"))


def parse_attack(text: str, norm: str) -> list[Any]:
    """Return an attack and its techniques, outermost first, of `NAME(field=value,...)+TECHNIQUE(...)+...`.

    A recipe stands for the text that it returns; techniques may follow it.

    Raises:
        UsageError: for an unknown name or field, a bad value, or an attack that is not defined in this norm.
    """
    calls = [_parse_call(part, "attack", text) for part in _cut(text, "+")]
    head, fields = calls[0]
    if head in catalog("recipe"):
        whole = find("recipe", head)()
        if fields:
            raise UsageError(f"recipe {head!r} takes no fields; write what it stands for: {whole!r}.")
        calls[:1] = [_parse_call(part) for part in _cut(whole, "+")]
        head, fields = calls[0]
    elif head in catalog("technique"):
        raise UsageError(
            f"{head} is a technique, which changes the gradients of an attack: write e.g. mi-fgsm+{text}."
        )
    elif head not in catalog("attack") and ":" not in head:
        raise did_you_mean("attack or recipe", head, [*catalog("recipe"), *catalog("attack")])
    value = make(head, **fields)
    _check_norm(value, norm)
    return [value, *(make_technique(name, **its) for name, its in calls[1:])]


def _check_norm(value: Any, norm: str) -> None:
    norms = getattr(value, "norms", value.info.norms)
    if norm not in norms:
        raise UsageError(f"{spec(value)['name']} is not defined in {norm}; it works in {', '.join(norms)}.")


def parse_method(text: str) -> Any:
    """Return the method of training of `NAME` or `NAME(field=value,...)`; UsageError as for `make`."""
    name, fields = _parse_call(text, "method")
    return make_method(name, **fields)


def parse_defenses(text: str) -> tuple[Any, ...]:
    """Return the defenses of a text such as `jpeg:75+smoothing:0.25,10`, in the order that an image meets them.

    Values are the defense's fields in order; those left out have their defaults.

    Raises:
        UsageError: for an unknown name, too many values, or a value that its field cannot have.
    """
    made = []
    for part in text.split("+"):
        name, colon, rest = part.strip().partition(":")
        kind = find("defense", name)
        hints, fields = get_type_hints(kind), dataclasses.fields(kind)
        values = rest.split(",") if colon else []
        if len(values) > len(fields):
            form = catalog("defense")[name].form
            raise UsageError(f"defense {part.strip()!r} has {len(values)} values; write {form}.")
        named = [(field.name, value) for field, value in zip(fields, values, strict=False)]
        made.append(kind(**{field: _convert(name, field, value, hints[field]) for field, value in named}))
    return tuple(made)


def _split(text: str) -> list[str]:
    """Cut at the commas outside brackets."""
    parts = _cut(text, ",")
    if not all(parts):
        raise UsageError(f"suite {text!r}: write names with commas between, e.g. 'pgd(steps=50),fgsm'.")
    return parts


def _cut(text: str, mark: str) -> list[str]:
    parts, depth = [""], 0
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        if sign == mark and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts]


def _parse_call(text: str, kind: str = "suite", whole: str | None = None) -> tuple[str, dict[str, str]]:
    """Turn `name(a=1,b=2)` into its name and fields; errors speak of the whole that it is part of."""
    whole = text if whole is None else whole
    match = re.fullmatch(r"([\w:.+-]+)(?:\((.*)\))?", text, re.DOTALL)
    if not match:
        raise UsageError(f"{kind} {whole!r}: write NAME or NAME(field=value,...), e.g. 'pgd(steps=50)'.")
    fields: dict[str, str] = {}
    for pair in filter(None, _cut(match[2] or "", ",")):
        key, equals, value = (piece.strip() for piece in pair.partition("="))
        if not equals or not key or not value:
            raise UsageError(f"{kind} {whole!r}: {pair.strip()!r} is not field=value.")
        if key in fields:
            raise UsageError(f"{kind} {whole!r}: field {key!r} is given twice.")
        fields[key] = value
    return match[1], fields


def _convert(name: str, field: str, value: Any, wanted: Any) -> Any:
    """Bring a field's value to its annotated type."""
    union = get_origin(wanted) in (Union, UnionType)
    kinds = get_args(wanted) if union else (wanted,)
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
        if type(None) in kinds:
            return None
    for kind in kinds:
        try:
            if kind is bool and str(value).lower() in ("true", "false"):
                return str(value).lower() == "true"
            if kind is int and not isinstance(value, bool) and int(value) == float(value):
                return int(value)
            if kind is float and not isinstance(value, bool):
                return float(Fraction(value) if isinstance(value, str) else value)
            if kind is str and isinstance(value, str):
                return value
        except (ValueError, TypeError, ArithmeticError):
            continue
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
    expected = " or ".join(words.get(kind, "none") for kind in kinds)
    raise UsageError(f"{name}: {field}={value!r} must be {expected}.")


def _literal(value: Any) -> Any:
    """Read a family member's field, whose types are another library's, as a Python literal if it is one."""
    try:
        return ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "none": None}.get(value.lower(), value)
