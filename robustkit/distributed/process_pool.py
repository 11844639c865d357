"""Where workers come from: processes of this machine. Wherever they come from, they come by the same door."""

from __future__ import annotations

import multiprocessing
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from multiprocessing.context import SpawnProcess
from typing import Protocol

import torch

from robustkit.distributed.service import serve

# Seconds that a process gets to end by itself once its driver has gone.
GRACE = 2.0


class Door:
    """A socket that workers come to; who comes must know the run's key."""

    def __init__(self, host: str) -> None:
        """Open it on a free port."""
        self.key = secrets.token_bytes(32)
        self.socket = socket.create_server((host, 0))

    @property
    def address(self) -> tuple[str, int]:
        """Where it is."""
        host, port = self.socket.getsockname()[:2]
        return host, port

    def admit(self) -> Connection | None:
        """Let in who has come; None for a stranger, or one who has gone again."""
        there, _ = self.socket.accept()
        there.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection: Connection = Connection(there.detach())
        try:
            deliver_challenge(connection, self.key)
            answer_challenge(connection, self.key)
        except (OSError, EOFError, multiprocessing.AuthenticationError):
            connection.close()
            return None
        return connection

    def close(self) -> None:
        """Shut it."""
        self.socket.close()


class Hiring(Protocol):
    """Starts and ends workers, `count` of `threads` each. `door` is where they come to once they run."""

    door: Door
    count: int
    threads: int

    def start(self, number: int) -> None:
        """Start the worker of that number."""

    def device(self, own: torch.device, number: int) -> str:
        """Return where the worker of that number computes; `own` is where the driver does."""

    def ended(self) -> list[tuple[int, str]]:
        """Return which workers have ended since the last call, and how."""

    def close(self) -> None:
        """End all."""


@contextmanager
def _deaf() -> Iterator[None]:
    """Let what is started inside not hear Ctrl-C, which is its driver's to see."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Local:
    """Worker processes of this machine, each a fresh interpreter with its share of the threads."""

    def __init__(self, count: int) -> None:
        """Open the door, to this machine alone."""
        self.count, self.threads = count, max(1, torch.get_num_threads() // count)
        self.door = Door("127.0.0.1")
        self.running: dict[int, SpawnProcess] = {}

    def start(self, number: int) -> None:  # noqa: D102
        process = multiprocessing.get_context("spawn").Process(
            target=serve, args=(self.door.address, self.door.key, number), daemon=True, name=f"worker {number}"
        )
        with _deaf():
            process.start()
        self.running[number] = process

    def device(self, own: torch.device, number: int) -> str:  # noqa: D102
        alone = own.type != "cuda" or own.index is not None
        return str(own) if alone else f"cuda:{number % torch.cuda.device_count()}"

    def ended(self) -> list[tuple[int, str]]:  # noqa: D102
        found = [(number, process.exitcode) for number, process in self.running.items() if not process.is_alive()]
        for number, _ in found:
            self.running.pop(number).join()
        return [
            (number, f"signal {-code}" if code and code < 0 else f"exit code {code}") for number, code in found
        ]

    def close(self) -> None:  # noqa: D102
        self.door.close()
        end = time.monotonic() + GRACE
        for process in self.running.values():
            process.join(max(end - time.monotonic(), 0))
            if process.is_alive():
                process.kill()
                process.join()
