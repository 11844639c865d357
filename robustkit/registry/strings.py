"""Texts that name things with their fields: suites of attacks, attacks with techniques, methods, defenses."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from robustkit.core.errors import UsageError, did_you_mean
from robustkit.core.step_size import check_pixels
from robustkit.registry.code_files import absolute_reference, is_reference
from robustkit.registry.construction import as_attack, make, make_method, make_technique, spec
from robustkit.registry.decorators import stage_name
from robustkit.registry.entries import catalog, find

DEFAULT_SUITE = "auto"
# What that is where a threat asks for minimum norms.
MINIMAL_SUITE = "minimum-norm"
# A suite of more attacks is a slip: each is run on every image.
MOST_ATTACKS = 1_000
# What a model's gradients may be replaced by (`robustkit.gradient_views.views`), in the order of what they
# promise; where the model is random, also by means over draws.
DRAWN = (
    "own",
    "mended",
    "loosened",
    "inner-logits",
    "fitted",
    "mean-logit",
    "mean-log-probability",
    "top-k",
    "soft-top-k",
    "straight-through",
)
VIEWS = (*DRAWN, "members", "stack", "calm", "frozen", "smooth", *(f"averaged-{view}" for view in DRAWN))

# Attacks by their names, or as objects; see `parse_suite`.
Suite = str | Callable[..., Any] | Sequence[str | Callable[..., Any]]

# What AutoAttack's own package calls its versions, and our suites of their attacks.
VERSIONS = {"standard": "autoattack", "plus": "autoattack-plus", "rand": "autoattack-rand"}


@dataclass(frozen=True)
class SuiteEntry:
    """An attack of a suite and the view of the model whose gradients it climbs; without one, the model's own.

    Whatever the view, what counts is the model as it is. A `spare` one is run only where the number is in doubt;
    an `arm` only on the images on which it is likely to succeed, judged by what the arms did in this run so far.
    """

    attack: Any
    view: str = ""
    spare: bool = False
    arm: bool = False

    @property
    def spec(self) -> dict[str, Any]:
        """The attack's record, with what else is said of it."""
        more = {"view": self.view, "spare": self.spare, "arm": self.arm}
        return spec(self.attack) | {name: value for name, value in more.items() if value}

    @property
    def name(self) -> str:
        """How a suite writes it, without fields."""
        return stage_name(self.spec)


def parse_suite(suite: Suite, norm: str, *, minimal: bool = False) -> list[SuiteEntry]:
    """Return the attacks of a suite, in order.

    `ATTACK@VIEW` uses the gradients of a view of the model (see `robustkit.gradient_views.views`); it is skipped
    for a model that has no view of that name. `ATTACK?` and `ATTACK@VIEW?` run only if the result is in doubt.
    `ATTACK*` is an arm: it runs on the images on which it is likely to succeed
    (`robustkit.engine.allocation.arms`).

    Args:
        suite: a comma-separated list of suites and attacks; an attack object or class; a function
            `(model, x, y, eps) -> x_adv`; or a sequence of these.
        norm: of the threat.
        minimal: whether the threat has no eps, so that only attacks that find minimum norms are meant, and `auto`
            is a suite of them.

    Raises:
        UsageError: for an unknown name or field, a bad value, a list that is empty or too long, or an attack that
            is not defined in this norm, or finds no minimum norm where one is asked for.
    """
    entries: list[SuiteEntry] = []
    for part in _parts_of(suite):
        if not isinstance(part, str):
            entries.append(SuiteEntry(as_attack(part)))
            continue
        name, fields = parse_call(part.rstrip("?*").partition("@")[0], whole=part)
        if name not in catalog("suite"):
            entries.append(_rung(part))
        elif fields or "@" in part or part.endswith(("?", "*")):
            raise UsageError(f"suite {name!r} takes no fields and no view; list its attacks to change them.")
        else:
            name = MINIMAL_SUITE if minimal and name == DEFAULT_SUITE else name
            entries += map(_rung, find("suite", name)(norm))
    for entry in entries:
        _check_norm(entry.attack, norm)
        if minimal:
            _check_minimal(entry, norm)
    _check_arms(entries)
    return entries


def _parts_of(suite: Suite) -> list[Any]:
    """Return the parts of a suite, each the text of one suite or attack, or an object."""
    if isinstance(suite, str):
        parts: list[Any] = split(suite)
    elif isinstance(suite, Sequence):
        parts = [part for one in suite for part in (split(one) if isinstance(one, str) else [one])]
    else:
        parts = [suite]
    if not parts:
        raise UsageError("suite [] has no attack; write names with commas between, e.g. 'pgd(steps=50),fgsm'.")
    if len(parts) > MOST_ATTACKS:
        raise UsageError(f"a suite of {len(parts):,} attacks is too long: write at most {MOST_ATTACKS:,}.")
    return parts


def suite_text(suite: Suite) -> str:
    """Return a suite in words: the text as it is, or the names of its attacks."""
    if isinstance(suite, str):
        return suite
    names = [part if isinstance(part, str) else spec(as_attack(part))["name"] for part in _parts_of(suite)]
    return ",".join(names)


def _check_minimal(entry: SuiteEntry, norm: str) -> None:
    if not entry.attack.info.minimal:
        known = [name for name, e in catalog("attack").items() if e.info.minimal and norm in e.info.norms]
        raise UsageError(
            f"{entry.name} searches within an eps, which threat '{norm}:min' does not have; write "
            f"{', '.join(known)} or {DEFAULT_SUITE}."
        )
    if entry.view or entry.spare or entry.arm:
        raise UsageError(
            f"{entry.name}: threat '{norm}:min' takes no views and no marks; leave out what is behind "
            f"{entry.attack.info.name}."
        )


def _check_arms(entries: list[SuiteEntry]) -> None:
    """Refuse arms that are not one group: they share what they learn of a net."""
    arms = [number for number, entry in enumerate(entries) if entry.arm]
    if arms and arms[-1] - arms[0] >= len(arms):
        raise UsageError("the attacks marked with * must follow one another; write other attacks before or after.")
    for number in arms:
        if entries[number].attack.info.coupled or entries[number].view:
            raise UsageError(
                f"{entries[number].name}* cannot be given to single images; mark with * only attacks of "
                "robustkit's own, without a view."
            )


def _rung(text: str) -> SuiteEntry:
    """Return the rung of `NAME(field=value,...)@VIEW?`, or with `*` in the place of `?`."""
    call, *views = _cut(text[:-1] if text.endswith(("?", "*")) else text, "@")
    name, fields = parse_call(call, whole=text)
    if suite := VERSIONS.get(name.lower().removeprefix("autoattack-")):
        raise UsageError(
            f"no suite or attack {name!r}: AutoAttack's version of that name is {suite!r} here; write it."
        )
    if not is_reference(name) and name not in catalog("attack") and ":" not in name:
        raise did_you_mean("suite or attack", name, [*catalog("suite"), *catalog("attack")])
    if views and (len(views) > 1 or views[0] not in VIEWS):
        raise did_you_mean("view", "@".join(views), VIEWS)
    return SuiteEntry(make(name, **fields), "".join(views), text.endswith("?"), text.endswith("*"))


def parse_attack(text: str, norm: str) -> list[Any]:
    """Return an attack and its techniques, outermost first, of `NAME(field=value,...)+TECHNIQUE(...)+...`.

    A recipe stands for the text that it returns; techniques may follow it.

    Raises:
        UsageError: for an unknown name or field, a bad value, or an attack that is not defined in this norm.
    """
    calls = [parse_call(part, "attack", text) for part in _cut(text, "+")]
    head, fields = calls[0]
    if head in catalog("recipe"):
        whole = find("recipe", head)()
        if fields:
            raise UsageError(f"recipe {head!r} takes no fields; write what it stands for: {whole!r}.")
        calls[:1] = [parse_call(part) for part in _cut(whole, "+")]
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
    check_pixels(spec(value)["name"], getattr(value, "step_size", None), norm)


def parse_method(text: str) -> Any:
    """Return the method of training of `NAME` or `NAME(field=value,...)`; UsageError as for `make`."""
    name, fields = parse_call(text, "method")
    return make_method(name, **fields)


def parse_defenses(text: str) -> tuple[Any, ...]:
    """Return the defenses of a text such as `jpeg:75+smoothing:0.25,10`, in the order that an image meets them.

    Values are the defense's fields in order; those left out have their defaults.

    Raises:
        UsageError: for an unknown name, too many values, or a value that its field cannot have.
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


def parse_call(text: str, kind: str = "suite", whole: str | None = None) -> tuple[str, dict[str, str]]:
    """Turn `name(a=1,b=2)` into its name and fields; errors speak of the whole that it is part of."""
    whole = text if whole is None else whole
    match = re.fullmatch(r"((?:[^(]+\.py:)?[\w:.+-]+)(?:\((.*)\))?", text, re.DOTALL)
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
