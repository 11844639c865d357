"""A worker of a run with several: its own process, with a model of its own, that does what the driver orders."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch

from robustkit.core.flags import Flag
from robustkit.core.isolation import evaluation_mode, threads
from robustkit.core.threat import ThreatModel
from robustkit.data.samples import Samples
from robustkit.engine.batching.continuous_batch import ContinuousBatch
from robustkit.engine.batching.samples import Admitted
from robustkit.engine.evaluation import tasks
from robustkit.engine.evaluation.block_runner import BlockRunner
from robustkit.engine.evaluation.results import RunResults
from robustkit.engine.evaluation.settings import RunSettings
from robustkit.engine.evaluation.tasks import Link
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.engine.progress import Progress
from robustkit.registry import parse_suite
from robustkit.runs.ledger import Chunk

# Seconds between two words to the driver, which are also how long a worker outlives it.
WORD_EVERY = 0.3
# Seconds that a step of a slow net may take, a pass forward and back of each sample aboard.
STEP = 20.0


def work(brief: tasks.Brief, link: Link) -> object:
    """Do what the driver orders of an evaluation; return the first thing it says that is no order of this run."""
    begun = time.perf_counter()
    torch.set_num_threads(brief.threads)
    device = torch.device(brief.device)
    model = brief.model.unpack(device, link.ask)
    source = Lent(brief.images)
    samples = Samples(brief.data, brief.labels, None, source, np.arange(len(brief.labels)))
    threat = ThreatModel.parse(brief.threat)
    entries = parse_suite(brief.suite, threat.norm, minimal=threat.minimal)
    settings = RunSettings(
        threat=threat,
        suite=brief.suite,
        entries=entries,
        seed=brief.seed,
        batch_size=brief.batch,
        slots=brief.slots,
        max_slots=brief.most,
        precision=brief.precision,
        choose_precision=brief.free,
    )
    with evaluation_mode(model):
        hand = EvaluationWorker(
            samples,
            settings,
            Outbox(link, source),
            RunResults.of(len(samples), [entry.spec for entry in entries]),
            InstrumentedModel(model, device, brief.precision),
            Voice(link),
            worker=(brief.number,),
            store=brief.store.here(),
        )
        hand.link, hand.source = link, source
        hand.begin(brief.random)
        with threads(min(hand.instrumented.threads, brief.threads)):
            link.send(tasks.Ready(time.perf_counter() - begun))
            while not isinstance(order := link.receive(), tasks.Briefing):
                hand.obey(order)
            return order


class Lent:
    """A `Source` of the images that the driver sends, for as long as they are in work."""

    slow: ClassVar[bool] = False

    def __init__(self, first: np.ndarray) -> None:
        """Keep the first ones for good."""
        self.first, self.lent = first, dict[int, np.ndarray]()

    def read(self, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        """Return those images, (B C H W)."""
        found = [self.lent[row] if row in self.lent else self.first[row] for row in rows.tolist()]
        return torch.from_numpy(np.stack(found) if found else self.first[:0].copy())

    def content(self, rows: npt.NDArray[np.int64]) -> Iterator[bytes]:
        """Yield the images' bytes."""
        yield from (image.numpy().tobytes() for image in self.read(rows))

    def flags(self, rows: npt.NDArray[np.int64]) -> tuple[Flag, ...]:
        """Return nothing: the driver looks at the files."""
        return ()


class Outbox:
    """A sink whose ledger is the driver's; images with a verdict are not kept."""

    def __init__(self, link: Link, source: Lent) -> None:
        """Send there."""
        self.link, self.source = link, source

    def write(self, *chunks: Chunk) -> None:
        """Send chunks."""
        self.link.send(tasks.Done(chunks))
        for chunk in chunks:
            for verdict in chunk.verdicts:
                self.source.lent.pop(verdict.position, None)


class Voice(Progress):
    """Tells the driver how far it is, from time to time."""

    def __init__(self, link: Link) -> None:
        """Tell it there."""
        self.link, self.spoke = link, 0.0

    def say(self, text: str) -> None:  # noqa: D102
        self.link.send(tasks.Said(text))

    def advance(self, done: float, robust: int) -> None:  # noqa: D102
        if time.perf_counter() - self.spoke > WORD_EVERY:
            self.link.send(tasks.Under(done))
            self.spoke = time.perf_counter()


class EvaluationWorker(BlockRunner):
    """A worker whose samples, ledger and orders are the driver's."""

    link: Link
    source: Lent
    asked = False
    order: tasks.Fly
    write_every = WORD_EVERY

    def begin(self, random: bool) -> None:
        """Size up the model; whether it is random the driver has found out."""
        self.prepare()
        self.instrumented.random = random
        if self.instrumented.slow_batch is not None:
            # What is under way is saved after a step.
            self.slots = min(self.slots, max(1, int(STEP / (3 * self.instrumented.seconds))))

    def task_name(self, first: int) -> str:
        """Return the name that the driver has given."""
        return self.order.name

    def unsettled(self, first: int) -> np.ndarray:
        """Return the positions that the driver has given."""
        return np.zeros(0, np.int64) if self.order.parcel is None else self.order.parcel.positions

    def obey(self, order: object) -> None:
        """Do what the driver orders."""
        if isinstance(order, tasks.Fly):
            self.order = order
            self.results.flags = dict(order.flags)
            if any(entry.view for entry in self.settings.entries[order.first - 1 : order.first - 1 + order.count]):
                self.reliability.find_views()
            if order.parcel is not None:
                self._receive(order.parcel)
            examples = np.arange(len(self.source.first))
            for _, table in order.active:
                self.source.lent |= dict(
                    zip(table.host["position"].tolist(), table.device["x"].numpy(), strict=True)
                )
            active = [(queue, table.to(self.instrumented.device)) for queue, table in order.active]
            self.asked = False
            for _ in self.run_admitted(order.first, order.count, lambda taken: self._board, examples, active):
                if self.batch is not None:
                    self._share_samples(self.batch)
        elif isinstance(order, tasks.Block):
            self._receive(order.parcel)
            positions = order.parcel.positions
            images = self.samples.images(positions)
            if order.stage:
                if self.settings.entries[order.stage - 1].view:
                    self.reliability.find_views()
                self.run_attack_chunk(order.stage, order.number, positions, images)
            else:
                self._run_chunk(0, order.number, positions, images, self._clean_verdicts)
        else:
            return  # asked to share when there was nothing left to
        self.source.lent.clear()
        self.link.send(tasks.Idle(self.search_facts))

    def _receive(self, parcel: tasks.Parcel) -> None:
        for at, position in enumerate(parcel.positions.tolist()):
            if parcel.hashes:
                self.results.images[position] = parcel.hashes[at]
                self.results.clean_margins[position], self.results.margins[position] = parcel.margins[at]
            if parcel.images is not None:
                self.source.lent[position] = parcel.images[at]

    def _board(self, free: int) -> Admitted:
        """Ask the driver for as many samples."""
        self.link.send(tasks.Want(free))
        while not isinstance(answer := self.link.receive(), tasks.Boarded):
            self.asked = True
        self._receive(answer.parcel)
        admitted = self._admission(answer.parcel.positions)(free)
        return admitted._replace(later=answer.later)

    def _share_samples(self, batch: ContinuousBatch) -> None:
        if self.link.waiting():
            self.link.receive()
            self.asked = True
        if self.asked:
            self.asked = False
            host = torch.device("cpu")
            self.link.send(tasks.Given([(queue, table.to(host)) for queue, table in batch.give_half()]))
