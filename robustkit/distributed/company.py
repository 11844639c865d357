"""All workers of a command: started at once, let in, replaced when they die. Crews say which run they are at."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import TYPE_CHECKING

from robustkit.core.errors import RunError
from robustkit.distributed import files
from robustkit.distributed.process_pool import Hiring
from robustkit.engine.evaluation import tasks
from robustkit.engine.evaluation.tasks import Gone, Link
from robustkit.engine.progress import Progress

if TYPE_CHECKING:
    from robustkit.distributed.crew import Crew

# Workers that die one after the other without a verdict between them, before the run gives up.
PATIENCE = 3
# Seconds between two looks at who has ended before it came, and at the clock.
LOOK_EVERY = 0.5


@dataclass(eq=False)
class Member:
    """A worker that has come; `held` are the positions it has, `done` how far it says it is with its order.

    `at` is the run it is at, `knows` the one whose model it has loaded or is loading; `stint` counts its models.
    It is `ordered` until it has said that its order is done, and `idle` when it could be given one. By `flight` it
    saves what it has under way.
    """

    number: int
    link: Link
    at: Crew | None = None
    knows: Crew | None = None
    stint: int = 0
    idle: bool = False
    ordered: bool = False
    asked: bool = False
    saved_as: str = ""
    held: set[int] = field(default_factory=set)
    finished: int = 0
    done: float = 0.0

    def join(self, crew: Crew) -> bool:
        """Have it at a run; return whether it knows the model already and need not be waited for."""
        self.at = crew
        if self.knows is crew:
            return True
        self.knows, self.idle = crew, False
        self.stint += 1
        self.tell(crew.brief(self.number))
        return False

    def begin(self, order: object) -> None:
        """Give it an order."""
        self.rest()
        self.idle, self.ordered = False, True
        self.tell(order)

    def rest(self) -> None:
        """Have it without an order."""
        self.idle, self.ordered, self.asked, self.finished, self.done = True, False, False, 0, 0.0

    def tell(self, message: object) -> None:
        """Send it a message; should it have died, that will be heard."""
        with suppress(Gone):
            self.link.send(message)


class Company:
    """As many workers as are hired, started at once; those that die are replaced. Use as a context manager."""

    def __init__(self, hiring: Hiring, progress: Progress) -> None:
        """Start them."""
        self.hiring, self.count, self.progress = hiring, hiring.count, progress
        self.members: list[Member] = []
        self.started = 0
        self.coming: set[int] = set()
        self.deaths = self.owed = 0
        self.looked = 0.0
        self.begun = time.perf_counter()
        self.ready: set[int] = set()
        for _ in range(self.count):
            self._start()

    def __enter__(self) -> Company:
        return self

    def __exit__(self, *_: object) -> None:
        for member in self.members:
            member.link.close()

    def _start(self) -> None:
        self.hiring.start(self.started)
        self.coming.add(self.started)
        self.started += 1

    def hear(self, seconds: float | None = None) -> Iterator[tuple[Member, object]]:
        """Yield what workers say, as it comes; `Came()` of a new one, `Gone()` of one that has died."""
        for _ in range(self.owed):
            self._start()
        self.owed = 0
        wires = {member.link.connection: member for member in self.members}
        for voice in wait([*wires, self.hiring.door.socket], LOOK_EVERY if seconds is None else seconds):
            if voice is self.hiring.door.socket:
                if member := self._admit():
                    yield member, tasks.Came()
                continue
            member = wires[voice]  # type: ignore[index]
            if member not in self.members:
                continue  # dismissed meanwhile
            try:
                message = member.link.receive()
            except Gone as gone:
                self.dismiss(member)
                self.progress.say(f"worker {member.number} has died; its images go back to the queue")
                yield member, gone
                continue
            if isinstance(message, tasks.Said):
                self.progress.say(f"worker {member.number}: {message.text}")
                continue
            if isinstance(message, tasks.Need):
                member.tell(files.answer(message.path, message.whole))
                continue
            if isinstance(message, tasks.Ready):
                self._welcome(member)
            yield member, message
        if time.perf_counter() - self.looked > LOOK_EVERY:
            self._look()

    def dismiss(self, member: Member) -> None:
        """Let one go, who ends by itself if it has not died; another will be started in its place."""
        member.link.close()
        self.members.remove(member)
        self.owed += 1

    def _look(self) -> None:
        """Replace those that have ended before they came."""
        self.looked = time.perf_counter()
        for number, how in self.hiring.ended():
            if number in self.coming:
                self.coming.discard(number)
                self.deaths = one_more_death(self.deaths, self.count, f" ({how})")
                self.progress.say(f"worker {number} has died ({how}); another takes its place")
                self._start()

    def _admit(self) -> Member | None:
        connection = self.hiring.door.admit()
        if connection is None:
            return None
        link = Link(connection)
        try:
            number = link.receive()
        except Gone:
            number = None
        if not isinstance(number, int):
            link.close()
            return None
        self.coming.discard(number)
        self.members.append(member := Member(number, link))
        return member

    def _welcome(self, member: Member) -> None:
        self.deaths = 0
        if len(self.ready) < self.count:
            self.ready.add(member.number)
            if len(self.ready) == self.count:
                seconds = time.perf_counter() - self.begun
                self.progress.say(f"{self.count} workers at work after {seconds:.1f} s")


def one_more_death(deaths: int, count: int, how: str = "") -> int:
    """Return one more than so many deaths in a row among `count` workers; RunError if these are too many."""
    if deaths + 1 > max(PATIENCE, count):
        raise RunError(
            f"workers die before they have done anything{how}; "
            "run without --workers to see why, or with fewer of them if memory is short."
        )
    return deaths + 1
