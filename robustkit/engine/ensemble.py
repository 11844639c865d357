"""Nets as one ensemble: how they are kept in memory, how each is run fastest, what they were asked."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from robustkit.engine.folding import folded
from robustkit.engine.meter import WORTH, Meter, Way, free_memory
from robustkit.engine.nets import Net
from robustkit.engine.streaming import Shelf, Streamed
from robustkit.engine.together import Together, stacked
from robustkit.goal import Goal
from robustkit.isolation import evaluation_mode, threads
from robustkit.rng import RowRng
from robustkit.shapes import Images
from robustkit.surrogates import Surrogates

# Images on which nets run as one must answer as they do alone.
TRIED = 8
FAST = {False: torch.contiguous_format, True: torch.channels_last}


@dataclass(frozen=True)
class Storage:
    """How much of an ensemble is in memory at once.

    `loaded`: all nets, else one at a time from where they lie. `held`: the graphs of all nets, else of one.
    """

    loaded: bool
    held: bool

    @classmethod
    def of(cls, nets: Sequence[Net], batch: int, device: torch.device, streaming: bool | None) -> Storage:
        """Return what fits into half of the free memory; `streaming` decides instead if it is not None."""
        if streaming is not None:
            return cls(loaded=not streaming, held=not streaming)
        room = free_memory(device) // 2
        weights = 0 if nets[0].model is not None else sum(net.parameters for net in nets)
        graphs = batch * sum(net.graph for net in nets)
        loaded = all(net.model is not None for net in nets)
        return cls(loaded=loaded, held=loaded and weights + graphs <= room)


@dataclass
class Ensemble:
    """Surrogates that count what they are asked, on a device.

    `ways` says how each net is run (see `tune`), as plain values: a resumed run goes on in the same ways, since
    another memory layout rounds otherwise and the sign of a gradient near 0 may turn.
    """

    nets: Sequence[Net]
    device: torch.device
    storage: Storage
    combine: str
    weights: Sequence[float] | None = None
    ways: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Load what is to be loaded."""
        shelf = Shelf(self.device)
        self._members: list[Meter | Streamed] = [
            Meter(net.load(self.device), self.device) if self.storage.loaded else Streamed(net, shelf)
            for net in self.nets
        ]
        self._together: Together | None = None

    @property
    def counts(self) -> tuple[int, int]:
        """Sample-propagations through all members so far, forwards and backwards."""
        counted: list[Any] = [*self._members, *([self._together] if self._together else [])]
        return sum(one.forwards for one in counted), sum(one.backwards for one in counted)

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Have every net in eval mode, its parameters out of autograd, and torch on as many threads as pay off."""
        with ExitStack() as stack:
            for member in self._members:
                if isinstance(member, Meter):
                    stack.enter_context(evaluation_mode(member.model))
            stack.enter_context(threads(max(net.threads for net in self.nets)))
            yield

    def surrogates(self, members: Sequence[int] | None = None) -> Surrogates:
        """Return all of them, or some, for an attack."""
        whole = Surrogates(
            self._members,
            combine=self.combine,
            weights=self.weights,
            hold=self.storage.held,
            together=self._together,
        )
        return whole if members is None else whole.select(members)

    def tune(self, x: Images, note: Callable[[str], str], *, hooked: bool) -> None:
        """Choose how to run each net, by trial on x: batch norms folded or not, memory layout, all as one or not.

        Args:
            x: a batch as it will come.
            note: is given the choice and returns the one that counts, made when the run began.
            hooked: whether hooks will look for the nets' blocks, which folding and stacking would hide.
        """
        meters = [member for member in self._members if isinstance(member, Meter)]
        if not meters:
            return
        if len(x):
            for meter in meters:
                meter.tune(x, precision=False)
        plain = {"members": [self._way_of(meter, hooked) for meter in meters], "together": False}
        self._take(meters, plain, x)
        if not hooked and self.storage.held and len(meters) > 1 and len({net.alike for net in self.nets}) == 1:
            plain["together"] = self.nets[0].alike is not None and self._faster_together(meters, x)
        self.ways = json.loads(note(json.dumps(plain)))
        self._take(meters, self.ways, x)
        self._forget()

    def _way_of(self, meter: Meter, hooked: bool) -> dict[str, bool]:
        return {
            "folded": meter.way.net is not meter.model and not hooked,
            "channels_last": meter.way.layout == torch.channels_last,
        }

    def _take(self, meters: Sequence[Meter], ways: dict[str, Any], x: Images) -> None:
        for meter, way in zip(meters, ways["members"], strict=True):
            net = (folded(meter.model, x[:1]) if way["folded"] else None) or meter.model
            meter.way = Way(net, None, FAST[way["channels_last"]])
        self._together = stacked(meters, x[:TRIED]) if ways["together"] else None

    def _faster_together(self, meters: Sequence[Meter], x: Images) -> bool:
        whole = stacked(meters, x[:TRIED])
        if whole is None:
            return False
        alone = self.surrogates()
        seconds = []
        for ensemble in (alone, replace(alone, together=whole)):
            taken = []
            for _ in range(3):
                begun = time.perf_counter()
                labels = torch.zeros(len(x), dtype=torch.int64, device=x.device)
                ids = torch.arange(len(x), device=x.device)
                ensemble.gradient(x, Goal(labels), "ce", RowRng(0, "trial", ids))
                if x.device.type == "cuda":
                    torch.cuda.synchronize(x.device)
                taken.append(time.perf_counter() - begun)
            seconds.append(min(taken[1:]))
        return seconds[1] < WORTH * seconds[0]

    def _forget(self) -> None:
        for member in self._members:
            member.forwards = member.backwards = 0
