"""Several runs that share one company of workers: all of them are busy as long as any run has something to do.

A worker that is free goes to a run that has none yet, so that it loads a model once and keeps it; only when no run
is without a worker do several share one, by samples, as in a command with one run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import Any, Generic, TypeVar

import torch

from robustkit.core.errors import RobustkitError
from robustkit.core.isolation import threads
from robustkit.distributed.company import LOOK_EVERY, Company, Member
from robustkit.distributed.crew import Brief, Crew
from robustkit.distributed.process_pool import Hiring
from robustkit.distributed.turns import Turn
from robustkit.engine.evaluation import tasks
from robustkit.engine.progress import Progress

T = TypeVar("T")


class Desk(Generic[T]):
    """A run at the bureau, and its agency: it has a crew while it asks for one."""

    def __init__(self, bureau: Bureau[T], work: Callable[[Desk[T]], T]) -> None:
        """Begin with nothing done."""
        self.bureau = bureau
        self.turn = Turn(lambda: work(self))
        self.team: Crew | None = None
        self.inbox: list[tuple[Member, object]] = []
        self.heard = 0.0

    @contextmanager
    def crew(self, brief: Brief) -> Iterator[Crew]:
        """Give a crew inside, to which workers come and from which they go."""
        self.inbox.clear()
        self.team = team = Crew(
            partial(brief, self.bureau.hiring), self._listen, self.bureau.hiring.count, sole=False
        )
        try:
            yield team
        finally:
            self.team = None
            for member in list(team.members):
                self.bureau.leave(member)

    def _listen(self) -> Iterator[tuple[Member, object]]:
        self.turn.pause()
        self.heard = time.perf_counter()
        while self.inbox:
            yield self.inbox.pop(0)

    @property
    def outcome(self) -> T | RobustkitError:
        """What the run returned, or why it has failed."""
        error = self.turn.error
        return error if isinstance(error, RobustkitError) else self.turn.value

    @property
    def wants(self) -> bool:
        """Whether another worker would find something to do."""
        return self.team is not None and self.team.more

    @property
    def alone(self) -> bool:
        """Whether it wants workers and has none."""
        return self.team is not None and self.team.more and not self.team.members


class Bureau(Generic[T]):
    """Has runs done at the same time by the workers of one `hiring`."""

    def __init__(self, works: Sequence[Callable[[Desk[T]], T]], hiring: Hiring, progress: Progress) -> None:
        """Take the runs on, in this order; each is given its desk."""
        self.hiring, self.progress = hiring, progress
        self.desks: list[Desk[T]] = []
        self.waiting = list(works)
        self.over = False

    def run(self) -> list[T | RobustkitError]:
        """Return what the runs return, in order, or of those that fail why."""
        with (
            closing(self.hiring),
            threads(torch.get_num_threads()),
            Company(self.hiring, self.progress) as self.company,
        ):
            try:
                while self.waiting or self._open:
                    self._begin()
                    self._assign()
                    self._hear()
            finally:
                self.over = True
                for desk in self._open:
                    desk.turn.stop()
        return [desk.outcome for desk in self.desks]

    @property
    def _open(self) -> list[Desk[T]]:
        return [desk for desk in self.desks if not desk.turn.ended]

    @property
    def _room(self) -> bool:
        """Whether a run is to begin: one for each worker, and one more that is there when one of these ends."""
        return bool(self.waiting) and len(self._open) <= self.company.count

    def _begin(self) -> None:
        if self._room:
            self.desks.append(desk := Desk(self, self.waiting.pop(0)))
            self._resume(desk)

    def _resume(self, desk: Desk[T]) -> None:
        desk.turn.resume()
        if desk.turn.ended and desk.turn.error and not isinstance(desk.turn.error, RobustkitError):
            raise desk.turn.error

    def _assign(self) -> None:
        """Send workers that have nothing to do to runs that have something."""
        for team in [desk.team for desk in self._open if desk.team]:
            for member in team.idle:
                others = any(other.alone for other in self._open) and len(team.members) > 1
                if others or not team.more:
                    self.leave(member)
        for member in self.company.members:
            # Before two share a run, all that can begin have begun.
            wanting = [desk for desk in self._open if (desk.wants if not self._room else desk.alone)]
            teams = [desk.team for desk in wanting if desk.team is not None]
            if member.at is None and member.idle and teams:
                self._send(member, min(teams, key=lambda team: (len(team.members), team is not member.knows)))

    def _send(self, member: Member, team: Crew) -> None:
        team.members.append(member)
        if member.join(team):
            # It need not load the model again: it is there.
            self._desk(team).inbox.append((member, tasks.Ready(0.0)))

    def leave(self, member: Member) -> None:
        """Take a worker away from its run; one that still has images of it is replaced by another."""
        if self.over:
            return
        if member.at:
            member.at.members.remove(member)
        member.at = None
        if member.held and member in self.company.members:
            self.company.dismiss(member)

    def _hear(self) -> None:
        """Take in what workers say, and let the runs go on that it is for, and now and then all."""
        for member, message in self.company.hear(0.0 if self._room else None):
            if isinstance(message, tasks.Failed):
                # It has let its run go, and waits for another.
                member.knows = None
                member.held.clear()
                member.rest()
            if member.at:
                self._desk(member.at).inbox.append((member, message))
            elif isinstance(message, (tasks.Came, tasks.Ready)):
                member.rest()
        now = time.perf_counter()
        for desk in self._open:
            if desk.inbox or now - desk.heard > LOOK_EVERY:
                self._resume(desk)

    def _desk(self, team: Crew) -> Desk[T]:
        return next(desk for desk in self.desks if desk.team is team)


class Watched(Progress):
    """Tells another what a run tells, and has the run end there if it is to end."""

    def __init__(self, inner: Progress, turn: Turn[Any]) -> None:
        """Tell `inner`."""
        self.inner, self.turn = inner, turn

    def say(self, text: str) -> None:  # noqa: D102
        self.inner.say(text)

    def stage(self, name: str, images: int, robust: int, n: int) -> None:  # noqa: D102
        self.turn.check()
        self.inner.stage(name, images, robust, n)

    def advance(self, done: float, robust: int) -> None:  # noqa: D102
        self.turn.check()
        self.inner.advance(done, robust)

    def close(self) -> None:  # noqa: D102
        self.inner.close()
