"""The decorators that register attacks, techniques, recipes, suites, defenses and training methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar

from robustkit.registry.fields import checked, hyphenated

T = TypeVar("T")

KINDS = ("attack", "technique", "recipe", "suite", "defense", "method")
# The keys of a record that identify code from outside robustkit.
ORIGIN = ("code", "package", "string")
# The other keys of a record; no field of a registered class may have such a name.
_RESERVED = (*ORIGIN, "view", "spare", "arm")


@dataclass(frozen=True)
class Info:
    """What a decorator declares about the class or function that it registers.

    `coupled` marks an attack whose random numbers depend on the batch. `family` marks a class that provides every
    name `NAME:ANYTHING`, by its class method `member(tail, **fields)`. `ascent` marks an attack that uses only
    gradients, so that techniques can change them (`robustkit.attack_api.composition`). `minimal` marks an attack
    that can search for the nearest adversarial point, without an eps.
    """

    kind: str
    name: str
    paper: str = ""
    norms: tuple[str, ...] = ()
    access: str = ""
    coupled: bool = False
    family: bool = False
    ascent: bool = False
    minimal: bool = False


def attack(
    name: str,
    *,
    paper: str,
    norms: tuple[str, ...],
    access: str,
    coupled: bool = False,
    family: bool = False,
    ascent: bool = False,
    minimal: bool = False,
) -> Callable[[type[T]], type[T]]:
    """Register a frozen dataclass as an attack. All arguments must be literals.

    Args:
        name: the file's stem, or `stem-…` or `stem:…`.
        paper: the source, e.g. `arXiv:1706.06083`.
        norms: the norms that it supports.
        access: what it needs from the model: `gradient`, `score`, `decision` or `any`.
        coupled: see `Info`.
        family: see `Info`.
        ascent: see `Info`.
        minimal: see `Info`.
    """
    return _register(Info("attack", name, paper, norms, access, coupled, family, ascent, minimal))


def technique(name: str, *, paper: str = "") -> Callable[[type[T]], type[T]]:
    """Register a frozen dataclass, a `Technique` of attack_api.composition, that changes an attack's gradients."""
    return _register(Info("technique", name, paper))


def recipe(name: str, *, paper: str = "") -> Callable[[T], T]:
    """Register a function `() -> attack string` as a name for an attack with its techniques."""
    return _register(Info("recipe", name, paper))


def suite(name: str, *, paper: str = "") -> Callable[[T], T]:
    """Register a function `(norm) -> list of attack strings` as a suite."""
    return _register(Info("suite", name, paper))


def defense(name: str, *, paper: str) -> Callable[[type[T]], type[T]]:
    """Register a frozen dataclass as a defense: a call `(model, x) -> logits` that is applied in front of a model.

    A model string gives the values of its fields in order after its name. All arguments must be literals.
    """
    return _register(Info("defense", name, paper))


def method(name: str, *, paper: str = "") -> Callable[[type[T]], type[T]]:
    """Register a frozen dataclass, a `robustkit.training.method.Method`, as a method of training.

    Its fields become flags of `robustkit train NAME`. All arguments must be literals.
    """
    return _register(Info("method", name, paper))


def _register(info: Info) -> Callable[[T], T]:
    hyphenated(info.name, f"@{info.kind}")

    def decorate(registered: T) -> T:
        if is_dataclass(registered):
            for field in fields(registered):
                if field.name in _RESERVED:
                    raise TypeError(f"{info.kind} {info.name!r}: no field may be called {field.name!r}.")
            checked(registered, info.name)
        registered.info = info  # type: ignore[attr-defined]
        return registered

    return decorate


def stage_name(record: Mapping[str, Any]) -> str:
    """Return the name of a stage from its record in a spec."""
    return str(record["name"]) + (f"@{record['view']}" if record.get("view") else "")
