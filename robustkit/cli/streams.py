"""The standard streams: results alone on stdout, everything else on stderr, whatever stands behind the two."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO, cast

from robustkit.core.errors import RunError, one_line, printable

# How the signs in our own texts are written where the stream's encoding lacks them.
SUBSTITUTES = str.maketrans({"–": "-", "−": "-", "…": "...", "→": "->", "━": "-", "╸": "-", "╺": "-"})


class Stream:
    """A text stream that is written to until that fails; `_failed` decides what a failure means."""

    def __init__(self, stream: TextIO) -> None:
        """Write to this one."""
        self._stream = stream
        self._closed = False

    def __getattr__(self, name: str) -> Any:
        """Return what the stream has beside."""
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text, its signs substituted or escaped where the encoding lacks them."""
        try:
            self._try(self._stream.write, text)
        except UnicodeEncodeError as error:
            known = text.translate(SUBSTITUTES).encode(error.encoding, "backslashreplace").decode(error.encoding)
            self._try(self._stream.write, known)
        return len(text)

    def close(self) -> None:
        """Stay open: it is not for others' code to say that nothing more is written."""

    def flush(self) -> None:
        """Write what is buffered."""
        self._try(self._stream.flush)

    def _try(self, work: Callable[..., object], *arguments: str) -> None:
        if self._closed:
            return
        try:
            work(*arguments)
        except OSError as error:
            self._closed = True
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        """Messages that nobody can read change nothing."""


class Results(Stream):
    """Standard output: a reader who has left is no failure, a full disk is one."""

    def _failed(self, error: OSError) -> None:
        if not isinstance(error, BrokenPipeError):
            raise RunError(
                f"cannot write the result to standard output: {error.strerror or error}; "
                "run the command again with an output that takes it."
            ) from error


_results: TextIO | None = None


def results() -> TextIO:
    """Return where the results of a verb go; prints of others' code go to stderr meanwhile."""
    return _results or sys.stdout


def print_result(text: str = "") -> None:
    """Print a line, or more, of a verb's result."""
    print(printable(text, keep="\n"), file=results())


@contextmanager
def guarded() -> Iterator[None]:
    """Write to stdout and stderr through `Results` and `Stream` inside, and flush both at the end."""
    out, err = Results(sys.stdout), Stream(sys.stderr)
    with redirect_stdout(cast(TextIO, out)), redirect_stderr(cast(TextIO, err)):
        yield
    err.flush()


@contextmanager
def results_apart() -> Iterator[None]:
    """Keep stdout for `results` inside: whatever a model, an attack or a library prints goes to stderr."""
    global _results
    before, _results = _results, results()
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _results = before


@contextmanager
def own_process() -> Iterator[None]:
    """Prepare the streams of a process that is ours alone.

    Closed ones are opened, so that no file of a run gets their numbers; stdout is kept where no library written in
    C prints to it; a library's warning is one line.
    """
    warnings.formatwarning = _warning
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # a closed stdout stays one that cannot be written to
            os.open(os.devnull, os.O_RDONLY if number == 1 else os.O_RDWR)
    out, err = (stream.encoding if stream else "utf-8" for stream in (sys.stdout, sys.stderr))
    kept = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = io.TextIOWrapper(open(kept, "wb"), out, line_buffering=os.isatty(kept))
    sys.stderr = io.TextIOWrapper(open(2, "wb", closefd=False), err, line_buffering=True)
    try:
        yield
    finally:
        # What could not be written by now is dropped: Python would try it again at exit, and exit with 120.
        for name in ("stdout", "stderr"):
            with suppress(OSError):
                getattr(sys, name).close()
            setattr(sys, name, open(os.devnull, "w"))


def _warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    said = str(message).strip().partition("\n")[0]
    return one_line(f"warning: {category.__name__}: {said} ({filename}:{lineno})") + "\n"
