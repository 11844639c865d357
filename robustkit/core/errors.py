"""The errors a person can cause, each one sentence: what is wrong, the value, what to write instead."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

# A path may be long, a number of thousands of digits says no more than its ends.
MAX_WORD_LENGTH = 300


class RobustkitError(ValueError):
    """Base of every error that robustkit raises on purpose."""

    def __str__(self) -> str:
        """Return the message, which may name what others have named, without control characters."""
        return printable(super().__str__(), keep="\n")


class UsageError(RobustkitError):
    """The request cannot be carried out as written; nothing has run. Exit code 2."""


class RunError(RobustkitError):
    """The run failed on the way: bad logits, a full disk, no memory. Exit code 3."""


class ModelError(RunError):
    """The model's own code failed. Exit code 3; 2 where it fails on the first image already."""


def printable(text: str, keep: str = "") -> str:
    """Return a text in which all that a terminal or page would not print as it stands is written as an escape.

    That is control characters (escape sequences begin with one), line breaks, signs that turn the direction of
    writing, surrogates, and spaces that look like others.

    Args:
        text: any text, of a file's or model's name for instance.
        keep: such characters to leave as they are, for example line breaks of our own.
    """
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() or sign in keep else repr(sign)[1:-1] for sign in text)


def one_line(text: str) -> str:
    """Return a message as one line that a terminal prints as it stands, its long words shortened.

    A file's name or a model's error may hold line breaks, control characters or thousands of digits.
    """
    words = (word if len(word) <= MAX_WORD_LENGTH else f"{word[:60]}…{word[-20:]}" for word in text.split())
    return printable(" ".join(words))


def error_summary(error: BaseException) -> str:
    """Return an error's type and the first line of what it says."""
    said = str(error).strip().partition("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def expand_path(path: str | os.PathLike[str]) -> Path:
    """Return a path with its ~ replaced.

    Raises:
        UsageError: if there is no such user, or a part of it holds NUL or is longer than 255 bytes.
    """
    text = os.path.expanduser(os.fspath(path))
    if text.startswith("~"):
        raise UsageError(f"the path {text!r} begins with ~ and no user's name; write the folder itself.")
    for part in Path(text).parts:
        if "\0" in part or len(part.encode(errors="surrogatepass")) > 255:
            raise UsageError(f"the name {part!r} is none that a file can have; write a shorter one, without NUL.")
    return Path(text)


def did_you_mean(kind: str, name: str, known: Iterable[str], more: Iterable[str] = ()) -> UsageError:
    """Return the error for an unknown name, with the nearest one, of `more` names too, which are not listed."""
    names = sorted(known)
    spelled = {other.lower(): other for other in (*names, *more)}
    near = difflib.get_close_matches(name.lower(), spelled, n=1, cutoff=0.5)
    hint = f" Did you mean {spelled[near[0]]!r}?" if near else ""
    return UsageError(f"no {kind} {name!r}.{hint} Known: {', '.join(names)}.")
