"""Suites: lists of attacks, given as text or as objects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from robustkit.core.errors import UsageError, did_you_mean
from robustkit.registry.code_files import is_reference
from robustkit.registry.construction import as_attack, make, spec
from robustkit.registry.decorators import stage_name
from robustkit.registry.entries import catalog, find
from robustkit.registry.strings import check_norm, cut, parse_call, split

DEFAULT_SUITE = "auto"
# The suite that `auto` means for a threat without eps, such as `l2:min`.
MINIMAL_SUITE = "minimum-norm"
# A longer suite is refused as a mistake: every attack is run on every image.
MAX_ATTACKS = 1_000
# The views that may replace a model's gradients (`robustkit.gradient_views.views`), the most promising first. Each
# of these can also be averaged over the random draws of a randomised model.
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

# The versions of AutoAttack's own package, and robustkit's suites of their attacks.
AUTOATTACK_VERSIONS = {"standard": "autoattack", "plus": "autoattack-plus", "rand": "autoattack-rand"}


@dataclass(frozen=True)
class SuiteEntry:
    """An attack of a suite.

    Attributes:
        attack: the attack.
        view: the view of the model whose gradients it uses; empty for the model's own. Whether an image is fooled
            is decided by the model itself, whatever the view.
        conditional: whether it is run only if the result is in doubt.
        arm: whether it is run only on the images on which it is likely to succeed, judged by what the arms of this
            run did so far.
    """

    attack: Any
    view: str = ""
    conditional: bool = False
    arm: bool = False

    @property
    def spec(self) -> dict[str, Any]:
        """The attack's record, with its view and marks."""
        more = {"view": self.view, "spare": self.conditional, "arm": self.arm}
        return spec(self.attack) | {name: value for name, value in more.items() if value}

    @property
    def name(self) -> str:
        """Its name in a suite, without fields."""
        return stage_name(self.spec)


def parse_suite(suite: Suite, norm: str, *, minimal: bool = False, gradients: bool = True) -> list[SuiteEntry]:
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
        gradients: whether the model has gradients. If not, a suite means those of its attacks that need none, or
            use the gradient of a view, on all images.

    Raises:
        UsageError: for an unknown name or field, a bad value, a list that is empty or too long, or an attack that
            is not defined in this norm, or finds no minimum norm if `minimal`, or needs a gradient that the model
            does not have.
    """
    entries: list[SuiteEntry] = []
    for part in _parts_of(suite):
        if not isinstance(part, str):
            entries.append(SuiteEntry(as_attack(part)))
            continue
        name, fields = parse_call(part.rstrip("?*").partition("@")[0], whole=part)
        if name not in catalog("suite"):
            entries.append(_read_entry(part))
        elif fields or "@" in part or part.endswith(("?", "*")):
            raise UsageError(f"suite {name!r} takes no fields and no view; list its attacks to change them.")
        else:
            name = MINIMAL_SUITE if minimal and name == DEFAULT_SUITE else name
            found = list(map(_read_entry, find("suite", name)(norm)))
            entries += found if gradients else _without_gradients(name, found)
    for entry in entries:
        check_norm(entry.attack, norm)
        if not gradients and _needs_gradient(entry):
            raise UsageError(
                f"{entry.name} needs gradients, and this model returns scores only; write square, or a suite, "
                "which then means its attacks that need none."
            )
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
    if len(parts) > MAX_ATTACKS:
        raise UsageError(f"a suite of {len(parts):,} attacks is too long: write at most {MAX_ATTACKS:,}.")
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
    if entry.view or entry.conditional or entry.arm:
        raise UsageError(
            f"{entry.name}: threat '{norm}:min' takes no views and no marks; leave out what follows "
            f"{entry.attack.info.name}."
        )


def _needs_gradient(entry: SuiteEntry) -> bool:
    """Return whether an attack needs the model's own gradient."""
    return entry.attack.info.access == "gradient" and not entry.view


def _without_gradients(suite: str, entries: list[SuiteEntry]) -> list[SuiteEntry]:
    """Return the attacks of a suite for a model without gradients, each once.

    An arm is given to all images: whether it is likely to succeed is judged by gradient attacks.
    """
    kept = [replace(entry, arm=False) for entry in entries if not _needs_gradient(entry)]
    if not kept:
        raise UsageError(
            f"all attacks of suite {suite!r} need gradients, and this model returns scores only; write --suite "
            "square."
        )
    return [entry for number, entry in enumerate(kept) if entry not in kept[:number]]


def _check_arms(entries: list[SuiteEntry]) -> None:
    """Refuse arms that are not consecutive: they share their estimates about a model."""
    arms = [number for number, entry in enumerate(entries) if entry.arm]
    if arms and arms[-1] - arms[0] >= len(arms):
        raise UsageError("the attacks marked with * must follow one another; write other attacks before or after.")
    for number in arms:
        if entries[number].attack.info.coupled or entries[number].view:
            raise UsageError(
                f"{entries[number].name}* cannot be given to single images; mark with * only attacks of "
                "robustkit's own, without a view."
            )


def _read_entry(text: str) -> SuiteEntry:
    """Return the entry of `NAME(field=value,...)@VIEW?`, or with `*` in the place of `?`."""
    call, *views = cut(text[:-1] if text.endswith(("?", "*")) else text, "@")
    name, fields = parse_call(call, whole=text)
    if suite := AUTOATTACK_VERSIONS.get(name.lower().removeprefix("autoattack-")):
        raise UsageError(
            f"no suite or attack {name!r}: AutoAttack's version of that name is {suite!r} here; write it."
        )
    if not is_reference(name) and name not in catalog("attack") and ":" not in name:
        raise did_you_mean("suite or attack", name, [*catalog("suite"), *catalog("attack")])
    if views and (len(views) > 1 or views[0] not in VIEWS):
        raise did_you_mean("view", "@".join(views), VIEWS)
    return SuiteEntry(make(name, **fields), "".join(views), text.endswith("?"), text.endswith("*"))
