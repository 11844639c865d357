"""The errors a person can cause, each one sentence: what is wrong, the value, what to write instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RobustkitError(ValueError):
    """Base of every error that robustkit raises on purpose."""


class UsageError(RobustkitError):
    """The request cannot be carried out as written; nothing has run. Exit code 2."""


class RunError(RobustkitError):
    """The run failed on the way: bad logits, a full disk, no memory. Exit code 3."""


def did_you_mean(kind: str, name: str, known: Iterable[str], more: Iterable[str] = ()) -> UsageError:
    """Return the error for an unknown name, with the nearest one, of `more` names too, which are not listed."""
    names = sorted(known)
    near = difflib.get_close_matches(name, [*names, *more], n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return UsageError(f"no {kind} {name!r}.{hint} Known: {', '.join(names)}.")
