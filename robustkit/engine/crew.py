"""The workers of a run as its driver sees them: who is there, who has what, who has died."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait

from robustkit.engine import wire
from robustkit.engine.hiring import Hiring
from robustkit.engine.progress import Progress
from robustkit.engine.wire import Brief, Gone, Link
from robustkit.errors import RunError, UsageError

# Workers that die one after the other without a verdict between them, before the run gives up.
PATIENCE = 3
# Seconds between two looks at who has ended before it came, and at the clock.
LOOK_EVERY = 0.5


@dataclass(eq=False)
class Member:
    """A worker that has come; `held` are the positions it has, `done` how far it says it is with its order."""

    number: int
    link: Link
    idle: bool = False
    asked: bool = False
    held: set[int] = field(default_factory=set)
    landed: int = 0
    done: float = 0.0

    def begin(self, order: object) -> None:
        """Give it an order."""
        self.rest()
        self.idle = False
        self.tell(order)

    def rest(self) -> None:
        """Have it without an order."""
        self.idle, self.asked, self.landed, self.done = True, False, 0, 0.0

    def tell(self, message: object) -> None:
        """Send it a message; should it have died, that will be heard."""
        with suppress(Gone):
            self.link.send(message)


class Crew:
    """So many workers, started at once; those that die are replaced. Use as a context manager."""

    def __init__(self, hiring: Hiring, count: int, brief: Callable[[int], Brief], progress: Progress) -> None:
        """Start them; `brief` says what one of that number has to know."""
        self.hiring, self.count, self.brief, self.progress = hiring, count, brief, progress
        self.members: list[Member] = []
        self.started = 0
        self.coming: set[int] = set()
        self.deaths = 0
        self.looked = 0.0
        self.begun = time.perf_counter()
        self.ready = 0
        for _ in range(count):
            self._start()

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        for member in self.members:
            member.link.close()

    @property
    def idle(self) -> list[Member]:
        """Those that have no order."""
        return [member for member in self.members if member.idle]

    def _start(self) -> None:
        self.hiring.start(self.started)
        self.coming.add(self.started)
        self.started += 1

    def hear(self) -> Iterator[tuple[Member, object]]:
        """Yield what workers say, as it comes; `Gone()` from one that has died, whose place another takes."""
        wires = {member.link.connection: member for member in self.members}
        heard = wait([*wires, self.hiring.door.socket], LOOK_EVERY)
        for voice in heard:
            if voice is self.hiring.door.socket:
                self._admit()
                continue
            member = wires[voice]  # type: ignore[index]
            try:
                message = member.link.receive()
            except Gone as gone:
                self.lose(member)
                yield member, gone
                continue
            if isinstance(message, wire.Failed):
                raise UsageError(message.reason) if message.usage else RunError(message.reason)
            if isinstance(message, wire.Said):
                self.progress.say(f"worker {member.number}: {message.text}")
                continue
            if isinstance(message, wire.Ready):
                self._welcome(message)
            yield member, message
        if time.perf_counter() - self.looked > LOOK_EVERY:
            self._look()

    def lose(self, member: Member) -> None:
        """Let one go that has died, and start another in its place."""
        member.link.close()
        self.members.remove(member)
        self._replace(f"worker {member.number}", "")

    def _look(self) -> None:
        """Replace those that have ended before they came."""
        self.looked = time.perf_counter()
        for number, how in self.hiring.ended():
            if number in self.coming:
                self.coming.discard(number)
                self._replace(f"worker {number}", how)

    def _admit(self) -> None:
        connection = self.hiring.door.admit()
        if connection is None:
            return
        link = Link(connection)
        try:
            number = link.receive()
            if isinstance(number, int):
                link.send(self.brief(number))
                self.coming.discard(number)
                self.members.append(Member(number, link))
        except Gone:
            link.close()

    def _welcome(self, message: wire.Ready) -> None:
        self.ready += 1
        if self.ready == self.count:
            seconds = time.perf_counter() - self.begun
            self.progress.say(f"{self.count} workers at work after {seconds:.1f} s")

    def _replace(self, who: str, how: str) -> None:
        self.deaths += 1
        if self.deaths > max(PATIENCE, self.count):
            raise RunError(
                f"workers die before they have done anything{how and f' ({how})'}; "
                "run without --workers to see why, or with fewer of them if memory is short."
            )
        self.progress.say(f"{who} has died{how and f' ({how})'}; its images go back to the queue")
        self._start()
