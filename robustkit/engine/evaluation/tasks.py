"""What a driver and its workers say to each other, and how: pickled messages over an authenticated socket.

The same whether the workers are processes of this machine or actors of a Ray cluster.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from robustkit.core.flags import Flag
from robustkit.distributed.files import Sent
from robustkit.distributed.model_files import Parcelled
from robustkit.engine.batching.row_batch import RowBatch
from robustkit.engine.model.loaded_models import Net
from robustkit.registry import Suite
from robustkit.runs.ledger import Chunk
from robustkit.runs.unfinished_work import Store


class Gone(BaseException):
    """The other side has ended. Like Ctrl-C it is nothing that an attack or a model could have caught."""


@dataclass(frozen=True)
class Parcel:
    """Samples for a worker: positions, images (B C H W; None where it has them), their hashes.

    `margins` (B 2) are those of the clean images, and the lowest so far. Before the clean pass there are no
    hashes.
    """

    positions: np.ndarray
    images: np.ndarray | None
    hashes: Sequence[str]
    margins: np.ndarray


@dataclass(frozen=True)
class Brief:
    """All that a worker has to know before its first order.

    `images` (16 at most) are to try the model on; the `store` is used where its folder can be reached.
    """

    number: int
    model: Parcelled
    device: str
    threads: int
    precision: str
    suite: Suite
    threat: str
    seed: int
    batch: int
    slots: int
    most: int
    free: bool
    random: bool
    data: str
    labels: np.ndarray
    images: np.ndarray
    store: Store


@dataclass(frozen=True)
class CraftBrief:
    """All that a worker of a craft run has to know before its first order.

    `nets` are the surrogates without their models, which are in `models`; `loaded` is whether all of them are
    in memory at once, `held` whether their graphs are, too. `ways` is how they are run, as the driver chose it;
    `pool` are the images that others may be mixed with; the `store` is used where its folder can be reached.
    """

    number: int
    nets: Sequence[Net]
    models: Sequence[Parcelled]
    loaded: bool
    held: bool
    ways: Mapping[str, Any]
    device: str
    threads: int
    threat: str
    attack: str
    combine: str
    weights: Sequence[float] | None
    seed: int
    batch: int
    data: str
    labels: np.ndarray
    pool: np.ndarray
    store: Store


Briefing = Brief | CraftBrief


@dataclass(frozen=True)
class Make:
    """An order: craft images of one stage, on some of the surrogates (None: all), towards goals by position."""

    stage: int
    attack: Any
    members: Sequence[int] | None
    goals: Mapping[int, int] | None
    positions: np.ndarray
    images: np.ndarray


@dataclass(frozen=True)
class Fly:
    """An order: take what boards, and those aboard another's flight before, through `count` stages.

    What is under way is saved by this name. What was saved by it before goes on, as far as it is in the parcel.
    """

    first: int
    count: int
    flags: Mapping[str, Flag]
    name: str
    parcel: Parcel | None = None
    active: Sequence[tuple[int, RowBatch]] = ()


@dataclass(frozen=True)
class Block:
    """An order: do one chunk of one stage."""

    stage: int
    number: int
    parcel: Parcel


@dataclass(frozen=True)
class Boarded:
    """An answer to `Want`; `later` is whether there may be more."""

    parcel: Parcel
    later: bool


@dataclass(frozen=True)
class Split:
    """A request: give some of those aboard to another worker. The answer is `Given`, or nothing at the end."""


@dataclass(frozen=True)
class Came:
    """A worker has come, and waits for its `Briefing`."""


@dataclass(frozen=True)
class Need:
    """A worker lacks a file of its brief's models, and waits for a `Sent` of its hash, or of the whole."""

    path: str
    whole: bool


@dataclass(frozen=True)
class Ready:
    """A worker has its model, after so many seconds."""

    seconds: float


@dataclass(frozen=True)
class Want:
    """A worker has so many slots free, and waits for `Boarded`."""

    free: int


@dataclass(frozen=True)
class Done:
    """Chunks, numbered by the worker."""

    chunks: Sequence[Chunk]


@dataclass(frozen=True)
class Under:
    """How many samples of its order a worker has done, those under way by their share."""

    done: float


@dataclass(frozen=True)
class Given:
    """Samples that a worker gives away."""

    active: Sequence[tuple[int, RowBatch]]

    @property
    def positions(self) -> list[int]:
        """Their positions in the data."""
        return [at for _, table in self.active for at in table.host["position"].tolist()]


@dataclass(frozen=True)
class Said:
    """News for a person."""

    text: str


@dataclass(frozen=True)
class Idle:
    """An order is done; `facts` are what a worker noticed on all its flights."""

    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Failed:
    """A worker cannot go on with this run, for this reason; `usage` is whether the request is at fault."""

    reason: str
    usage: bool


@dataclass(frozen=True)
class Link:
    """One end of the wire."""

    connection: Connection

    def send(self, message: object) -> None:
        """Send; `Gone` if nobody is there."""
        try:
            self.connection.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))
        except OSError as error:
            raise Gone from error

    def receive(self) -> object:
        """Wait for a message; `Gone` if nobody is there."""
        try:
            return pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise Gone from error

    def waiting(self) -> bool:
        """Return whether a message is there; `Gone` if nobody is."""
        try:
            return self.connection.poll()
        except (EOFError, OSError) as error:
            raise Gone from error

    def ask(self, path: str, whole: bool) -> Sent:
        """Return what the driver says of a file of its; called while it gives no orders."""
        self.send(Need(path, whole))
        while not isinstance(found := self.receive(), Sent):
            pass
        return found

    def close(self) -> None:
        """End it; the other side will notice."""
        self.connection.close()
