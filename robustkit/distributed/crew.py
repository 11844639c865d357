"""The workers of a run as its driver sees them: who is there, who has what, who has died."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from robustkit.core.errors import RunError, UsageError
from robustkit.distributed.company import Company, Member, one_more_death
from robustkit.distributed.process_pool import Hiring
from robustkit.distributed.ray_pool import hire
from robustkit.engine.evaluation import tasks
from robustkit.engine.evaluation.tasks import Briefing, Gone
from robustkit.engine.progress import Progress


@dataclass(eq=False)
class Crew:
    """Those of a company that are at one run.

    `brief` says what one of that number has to know, `listen` yields what they say. `total` is how many the
    company has, `sole` whether all of them are here or to come; `more` whether another would find something to do.
    """

    brief: Callable[[int], Briefing]
    listen: Callable[[], Iterator[tuple[Member, object]]]
    total: int
    sole: bool = True
    members: list[Member] = field(default_factory=list)
    deaths: int = 0
    more: bool = False

    @property
    def count(self) -> int:
        """How many share the run's queue."""
        return self.total if self.sole else max(1, len(self.members))

    @property
    def idle(self) -> list[Member]:
        """Those that have no order."""
        return [member for member in self.members if member.idle]

    def hear(self) -> Iterator[tuple[Member, object]]:
        """Yield what they say, as it comes; `Gone()` from one that has died, whose place another takes."""
        for member, message in self.listen():
            if isinstance(message, tasks.Came):
                self.members.append(member)
                member.join(self)
                continue
            if isinstance(message, tasks.Failed):
                raise UsageError(message.reason) if message.usage else RunError(message.reason)
            if isinstance(message, Gone):
                self.members.remove(member)
                self.deaths = one_more_death(self.deaths, self.total)
            elif isinstance(message, tasks.Ready):
                member.rest()
            yield member, message


Brief = Callable[[Hiring, int], Briefing]


class Agency(Protocol):
    """Where a run gets its crew from."""

    def crew(self, brief: Brief) -> AbstractContextManager[Crew]:
        """Give a crew inside; `brief` says what the worker of that number, so hired, has to know."""


@dataclass(frozen=True)
class Alone:
    """The agency of a command with one run: the whole company is its crew, from the time it is asked for."""

    workers: int | None
    ray: str | None
    progress: Progress

    @contextmanager
    def crew(self, brief: Brief) -> Iterator[Crew]:
        """Give a crew inside."""
        with closing(hire(self.workers, self.ray)) as hiring, Company(hiring, self.progress) as company:
            yield Crew(partial(brief, hiring), company.hear, company.count)
