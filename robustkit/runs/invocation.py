"""The command line of this process, for the record; none if the work was started from Python."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

_words: ContextVar[tuple[str, ...] | None] = ContextVar("words", default=None)
# The part of an address that names a user and often a password.
_LOGIN = re.compile(r"(://)[^/@\s]+@")


@contextmanager
def record_command(words: Sequence[str]) -> Iterator[None]:
    """Let `command` return these words while the block runs."""
    token = _words.set(tuple(words))
    try:
        yield
    finally:
        _words.reset(token)


def command() -> str | None:
    """Return the command as a shell reads it, without logins in addresses; None if there is none."""
    words = _words.get()
    return None if words is None else shlex.join(["robustkit", *(_LOGIN.sub(r"\1…@", word) for word in words)])
