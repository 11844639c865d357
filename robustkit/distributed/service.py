"""A process that works for a driver: at one run after another, as it is told."""

from __future__ import annotations

from multiprocessing.connection import Client

import torch

from robustkit.core.errors import RobustkitError, UsageError, error_summary
from robustkit.crafting import craft_worker
from robustkit.engine.evaluation import evaluate_worker, tasks
from robustkit.engine.evaluation.tasks import Gone, Link


def serve(address: tuple[str, int], key: bytes, number: int) -> None:
    """Be a worker until the driver ends the connection."""
    try:
        link = Link(Client(address, authkey=key))
    except (OSError, EOFError):
        return  # the driver has ended meanwhile
    try:
        link.send(number)
        brief = link.receive()
        while isinstance(brief, tasks.Briefing):
            try:
                brief = (
                    evaluate_worker.work(brief, link)
                    if isinstance(brief, tasks.Brief)
                    else craft_worker.work(brief, link)
                )
            except RobustkitError as error:
                link.send(tasks.Failed(str(error), isinstance(error, UsageError)))
                brief = _next(link)
            # The driver's Ctrl-C is not heard here: one that is raised comes from the code of others.
            except (Exception, SystemExit, KeyboardInterrupt) as error:
                link.send(tasks.Failed(f"a worker failed with {error_summary(error)}.", usage=False))
                brief = _next(link)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # the last run's model has gone
    except Gone:
        return
    finally:
        link.close()


def _next(link: Link) -> object:
    """Return the next run's brief; what else the driver says was meant for the run that failed."""
    while not isinstance(message := link.receive(), tasks.Briefing):
        pass
    return message
