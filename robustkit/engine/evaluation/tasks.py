"""What the driver of an evaluation sends to its workers, and what they return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from robustkit.core.flags import Flag
from robustkit.data.samples import Source
from robustkit.distributed.pool import Handle
from robustkit.distributed.sent_models import SentModel
from robustkit.engine.batching.row_batch import RowBatch
from robustkit.engine.evaluation.settings import RunSettings
from robustkit.runs.ledger import Chunk
from robustkit.runs.unfinished_work import Store

# Rows of a worker that it gives to another: the number of the attack that they are in, and the rows.
GivenRows = Sequence[tuple[int, RowBatch]]


@dataclass(frozen=True)
class Data:
    """The images and labels of a run, as workers need them.

    Attributes:
        name: the data string.
        labels: of all images (N).
        images: the first ones, to try the model on (16 at most, C H W).
        source: what reads images from files; None if the driver sends all images.
        rows: the row of the source at each position (N).
    """

    name: str
    labels: np.ndarray
    images: np.ndarray
    source: Source | None
    rows: np.ndarray


@dataclass(frozen=True)
class Job:
    """All that a worker has to know of a run before its first task.

    Attributes:
        number: of the worker.
        model: of the run.
        data: of the run.
        settings: of the run, without its entries, which the worker creates from the suite.
        device: where the worker computes.
        processes: how many workers compute on this device.
        threads: how many CPU threads it uses.
        random: whether the model is random.
        store: keeps unfinished work; used where its folder can be reached.
    """

    number: int
    model: SentModel
    data: Handle[Data]
    settings: RunSettings
    device: str
    processes: int
    threads: int
    random: bool
    store: Store


@dataclass(frozen=True)
class Parcel:
    """Samples for a worker.

    Attributes:
        positions: in the data (B).
        images: (B C H W); None where the worker reads them or has them.
        hashes: of the images; none before the clean pass.
        margins: of the clean images, and the lowest so far (B 2).
    """

    positions: np.ndarray
    images: np.ndarray | None
    hashes: Sequence[str]
    margins: np.ndarray


@dataclass(frozen=True)
class Search:
    """Row-wise attacks that a worker runs on the samples that steps bring.

    Attributes:
        first, count: the stage of the first attack, and how many attacks follow one another.
        name: under which unfinished rows are saved; those that were saved under it before continue.
        flags: of the run so far.
    """

    first: int
    count: int
    name: str
    flags: Mapping[str, Flag]


@dataclass(frozen=True)
class Step:
    """A part of a search.

    Attributes:
        search: which; a new one starts if the worker's search has another name.
        parcel: new samples.
        seconds: after which the worker returns its results; 0 for a step that runs nothing.
        last: whether no more samples will come.
        resume: rows that another worker gave away.
        release: whether to give away every other row.
    """

    search: Search
    parcel: Parcel
    seconds: float
    last: bool = False
    resume: GivenRows = ()
    release: bool = False


@dataclass(frozen=True)
class Batch:
    """One batch of one stage.

    Attributes:
        stage: 0 for the clean pass and the checks.
        number: of the chunk.
        parcel: the samples.
        content: the sha256 of what the images are read from, where the worker reads them for the first time.
    """

    stage: int
    number: int
    parcel: Parcel
    content: str | None = None


@dataclass(frozen=True)
class Result:
    """What a task has done.

    Attributes:
        chunks: numbered by the worker.
        messages: for the user.
        free: how many rows more the worker could run at once; negative if samples wait for a free row.
        progress: of unfinished samples, in whole samples.
        released: rows that are given away.
        ended: whether the search has ended.
        facts: for the run's record, of all searches so far.
    """

    chunks: Sequence[Chunk]
    messages: Sequence[str] = ()
    free: int = 0
    progress: float = 0.0
    released: GivenRows = ()
    ended: bool = True
    facts: Mapping[str, Any] = field(default_factory=dict)
