"""Functions that take turns: each in a thread of its own, and only one of all goes on at a time.

For runs side by side in one driver: what waits for workers stands deep inside them, and everything else of theirs
(the global generators, torch's threads, the ledger's connection) may count on being alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Stopped(BaseException):
    """The turn is to end. Like Ctrl-C it is nothing that an attack or a model could have caught."""


class Turn(Generic[T]):
    """A function that goes on while whoever resumes it waits, until it pauses or ends."""

    def __init__(self, work: Callable[[], T]) -> None:
        """Begin paused."""
        self.work = work
        self.value: T
        self.error: BaseException | None = None
        self.ended = self.going = self.stopped = False
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def resume(self) -> None:
        """Let it go on until it pauses or ends."""
        self.going = True
        self._go.release()
        self._back.acquire()

    def pause(self) -> None:
        """Let the others go on; called inside. `Stopped` if it is to end."""
        self.going = False
        self._back.release()
        self._go.acquire()
        self.check()

    def check(self) -> None:
        """Raise `Stopped` if it is to end; called inside."""
        if self.stopped:
            raise Stopped

    def stop(self) -> None:
        """Have it end, from a pause or at its next one."""
        self.stopped = True
        if self.going:  # an interrupt came while it was waited for
            self._back.acquire()
        while not self.ended:
            self.resume()
        self._thread.join()

    def _run(self) -> None:
        self._go.acquire()
        try:
            self.check()
            self.value = self.work()
        except BaseException as error:
            self.error = error
        self.ended, self.going = True, False
        self._back.release()
