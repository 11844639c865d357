"""Errors that a user can cause; the message is one sentence with the value, what is wrong, and a remedy."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

# The most characters of a word in a message: enough for paths; longer numbers are shortened.
MAX_WORD_LENGTH = 300
# Where files are that a worker got from a driver on another machine, by the paths that the driver's strings have.
relocated: dict[str, str] = {}


class RobustkitError(ValueError):
    """Base of every error that robustkit raises on purpose."""

    def __str__(self) -> str:
        """Return the message without control characters, which names of files and models may contain."""
        return printable(super().__str__(), keep="\n")


class UsageError(RobustkitError):
    """The request cannot be carried out as written; nothing has run. Exit code 2."""


class RunError(RobustkitError):
    """The run failed: bad logits, a full disk, no memory. Exit code 3."""


class ModelError(RunError):
    """The model's own code failed. Exit code 3; 2 where it fails on the first image already."""


def printable(text: str, keep: str = "") -> str:
    """Return a text with non-printable characters escaped.

    These are control characters (with which escape sequences start), line breaks, characters that change the text
    direction, surrogates, and spaces that look like others.

    Args:
        text: any text, for example the name of a file or model.
        keep: non-printable characters that are not escaped, for example line breaks.
    """
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() or sign in keep else repr(sign)[1:-1] for sign in text)


def one_line(text: str) -> str:
    """Return a message as one printable line, with long words shortened.

    The name of a file or the error of a model may contain line breaks, control characters or thousands of digits.
    """
    words = (word if len(word) <= MAX_WORD_LENGTH else f"{word[:60]}…{word[-20:]}" for word in text.split())
    return printable(" ".join(words))


def error_summary(error: BaseException) -> str:
    """Return an error's type and the first line of its message."""
    message = str(error).strip().partition("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def expand_path(path: str | os.PathLike[str]) -> Path:
    """Return a path with its ~ replaced, or where the file is that was sent to this machine under this path.

    Raises:
        UsageError: if there is no such user, or a part of it contains NUL or is longer than 255 bytes.
    """
    text = os.path.expanduser(os.fspath(path))
    if text.startswith("~"):
        raise UsageError(f"the path {text!r} begins with ~ and no user's name; write the folder itself.")
    for part in Path(text).parts:
        if "\0" in part or len(part.encode(errors="surrogatepass")) > 255:
            raise UsageError(f"the name {part!r} is none that a file can have; write a shorter one, without NUL.")
    return Path(relocated.get(os.path.normpath(text), text))


def did_you_mean(kind: str, name: str, known: Iterable[str], more: Iterable[str] = ()) -> UsageError:
    """Return the error for an unknown name.

    Args:
        kind: what the name should be, for example "attack".
        name: the unknown name.
        known: the known names, which the message lists.
        more: further names that the nearest name can come from, but that are not listed.
    """
    names = sorted(known)
    spelled = {other.lower(): other for other in (*names, *more)}
    near = difflib.get_close_matches(name.lower(), spelled, n=1, cutoff=0.5)
    hint = f" Did you mean {spelled[near[0]]!r}?" if near else ""
    return UsageError(f"no {kind} {name!r}.{hint} Known: {', '.join(names)}.")


def check_choices(owner: object, **choices: Iterable[str]) -> None:
    """Refuse an object with a field that has none of the values it may have.

    Args:
        owner: has the fields.
        choices: for the name of each field the values it may have.

    Raises:
        UsageError: for the first such field, with the nearest value.
    """
    for field, known in choices.items():
        if getattr(owner, field) not in known:
            raise did_you_mean(field, getattr(owner, field), known)
