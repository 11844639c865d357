"""Names with parameters: attacks with techniques, methods, defenses, and the calls in suites."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from robustkit.core.errors import UsageError, did_you_mean
from robustkit.core.step_size import check_pixels
from robustkit.registry.code_files import absolute_reference, is_reference
from robustkit.registry.construction import make, make_method, make_technique, spec
from robustkit.registry.entries import catalog, find


def parse_attack(text: str, norm: str) -> list[Any]:
    """Return an attack and its techniques, outermost first, of `NAME(field=value,...)+TECHNIQUE(...)+...`.

    The name of a recipe is replaced by the text that it returns; techniques may follow it.

    Raises:
        UsageError: for an unknown name or field, a bad value, or an attack that is not defined in this norm.
    """
    calls = [parse_call(part, "attack", text) for part in cut(text, "+")]
    head, fields = calls[0]
    if head in catalog("recipe"):
        whole = find("recipe", head)()
        if fields:
            raise UsageError(f"recipe {head!r} takes no fields; write the attack that it names: {whole!r}.")
        calls[:1] = [parse_call(part) for part in cut(whole, "+")]
        head, fields = calls[0]
    elif head in catalog("technique"):
        raise UsageError(
            f"{head} is a technique, which changes the gradients of an attack: write e.g. mi-fgsm+{text}."
        )
    elif head not in catalog("attack") and ":" not in head:
        raise did_you_mean("attack or recipe", head, [*catalog("recipe"), *catalog("attack")])
    value = make(head, **fields)
    check_norm(value, norm)
    return [value, *(make_technique(name, **its) for name, its in calls[1:])]


def check_norm(value: Any, norm: str) -> None:
    """Raise UsageError for an attack that is not defined in a norm, or whose step size is not."""
    norms = getattr(value, "norms", value.info.norms)
    if norm not in norms:
        raise UsageError(f"{spec(value)['name']} is not defined in {norm}; it works in {', '.join(norms)}.")
    check_pixels(spec(value)["name"], getattr(value, "step_size", None), norm)


def parse_method(text: str) -> Any:
    """Return the method of training of `NAME` or `NAME(field=value,...)`; UsageError as for `make`."""
    name, fields = parse_call(text, "method")
    return make_method(name, **fields)


def parse_defenses(text: str) -> tuple[Any, ...]:
    """Return the defenses of a text such as `jpeg:75+smoothing:0.25,10`, in the order of their application.

    Values are the defense's fields in order; those left out have their defaults.

    Raises:
        UsageError: for an unknown name, too many values, or an invalid value of a field.
    """
    made = []
    for part in text.split("+"):
        name, values = _defense_call(part.strip())
        kind = find("defense", name)
        fields = dataclasses.fields(kind)
        if len(values) > len(fields):
            form = f"{name}:{','.join(field.name for field in fields).upper()}"
            raise UsageError(f"defense {part.strip()!r} has {len(values)} values; write {form}.")
        made.append(kind(**{field.name: value for field, value in zip(fields, values, strict=False)}))
    return tuple(made)


def absolute_defenses(text: str) -> str:
    """Return a text of defenses with absolute paths of its files, so that it can be read in any folder."""
    made = []
    for part in text.split("+"):
        name, values = _defense_call(part.strip())
        made.append(":".join([absolute_reference(name), *([",".join(values)] if values else [])]))
    return "+".join(made)


def defense_files(text: str) -> list[str]:
    """Return the `FILE.py:NAME` that a text of defenses names."""
    names = [_defense_call(part.strip())[0] for part in text.split("+")]
    return [name for name in names if is_reference(name)]


def _defense_call(text: str) -> tuple[str, list[str]]:
    """Return a defense's name and values of `NAME:VALUE,VALUE` or `FILE.py:NAME:VALUE,VALUE`."""
    file = re.match(r".+\.py:[^:]*", text)
    name, colon, values = (file[0], *text[file.end() :].partition(":")[1:]) if file else text.partition(":")
    return name, values.split(",") if colon else []


def split(text: str) -> list[str]:
    """Cut at the commas outside brackets."""
    parts = cut(text, ",")
    if not all(parts):
        raise UsageError(f"suite {text!r}: write names with commas between, e.g. 'pgd(steps=50),fgsm'.")
    return parts


def cut(text: str, mark: str) -> list[str]:
    """Return the parts of a text between marks, each stripped; marks inside brackets are part of the text."""
    parts, depth = [""], 0
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        if sign == mark and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts]


def parse_call(text: str, kind: str = "suite", whole: str | None = None) -> tuple[str, dict[str, str]]:
    """Return name and fields of `name(a=1,b=2)`; errors quote the whole text that it is part of."""
    whole = text if whole is None else whole
    match = re.fullmatch(r"((?:[^(]+\.py:)?[\w:.+-]+)(?:\((.*)\))?", text, re.DOTALL)
    if not match:
        raise UsageError(f"{kind} {whole!r}: write NAME or NAME(field=value,...), e.g. 'pgd(steps=50)'.")
    fields: dict[str, str] = {}
    for pair in filter(None, cut(match[2] or "", ",")):
        key, equals, value = (piece.strip() for piece in pair.partition("="))
        if not equals or not key or not value:
            raise UsageError(f"{kind} {whole!r}: {pair.strip()!r} is not field=value.")
        if key in fields:
            raise UsageError(f"{kind} {whole!r}: field {key!r} is given twice.")
        fields[key] = value
    return match[1], fields
