"""Signals that end a command: Ctrl-C, and those that schedulers and closed terminals send."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

WORDS = {"SIGINT": "interrupted", "SIGTERM": "ended by SIGTERM", "SIGHUP": "ended by SIGHUP"}


class Interrupted(KeyboardInterrupt):
    """A signal ended the command. Any other KeyboardInterrupt was raised by the code of a model or library."""

    def __init__(self, number: int) -> None:
        """Store the words for a signal and its exit code."""
        super().__init__(WORDS[signal.Signals(number).name])
        self.code = 128 + number


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Raise `Interrupted` in the block when such a signal arrives, unless it is handled or ignored already."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {}
    for name in WORDS:
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            before[number] = signal.signal(number, _raise)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise(number: int, frame: Any) -> None:
    raise Interrupted(number)
