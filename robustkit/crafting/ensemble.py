"""Nets as one ensemble: how they are kept in memory, how each is run fastest, what they were asked."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from robustkit.attack_api import Surrogates
from robustkit.core.criteria import Goal
from robustkit.core.isolation import evaluation_mode, threads
from robustkit.core.memory import free_memory
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images
from robustkit.crafting.lazy_models import LazyModel, ModelSlot
from robustkit.crafting.posterior_members import PosteriorMembers
from robustkit.engine.model.batchnorm_folding import folded
from robustkit.engine.model.instrumented_model import ExecutionConfig, InstrumentedModel
from robustkit.engine.model.loaded_models import Net
from robustkit.engine.model.profiling import MAX_TIME_SHARE, tune
from robustkit.engine.model.stacked_models import StackedModels, stacked

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
        shelf = None if self.storage.loaded else ModelSlot(self.device)
        self._members = [self._member(net, shelf) for net in self.nets]
        self._together: StackedModels | None = None

    def _member(self, net: Net, shelf: ModelSlot | None) -> InstrumentedModel | LazyModel | PosteriorMembers:
        if net.count > 1:
            return PosteriorMembers(net, self.device, shelf)
        return net.instrumented(net.load(self.device), self.device) if shelf is None else LazyModel(net, shelf)

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
                model = member.whole if isinstance(member, PosteriorMembers) else getattr(member, "model", None)
                if model is not None:
                    stack.enter_context(evaluation_mode(model))
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
        members = [member for member in self._members if not isinstance(member, LazyModel)]
        if not self.storage.loaded:
            return
        if len(x):
            for member in members:
                if isinstance(member, PosteriorMembers):
                    member.tune_layout(x)
                else:
                    images = len(x) if member.slow_batch is None else member.trial_batch
                    tune(member, x[:images], precision=False)
        plain = {"members": [self._way_of(member, hooked) for member in members], "together": False}
        self._take(members, plain, x)
        if not hooked and self.storage.held and len(members) > 1 and len({net.alike for net in self.nets}) == 1:
            plain["together"] = self.nets[0].alike is not None and self._faster_together(x)
        self.follow(json.loads(note(json.dumps(plain))), x)

    def follow(self, ways: dict[str, Any], x: Images) -> None:
        """Run each net as it was chosen for others like these, x being some images."""
        self.ways = ways
        if ways:
            members = [member for member in self._members if not isinstance(member, LazyModel)]
            self._take(members, ways, x)
            self._forget()

    def _way_of(self, member: InstrumentedModel | PosteriorMembers, hooked: bool) -> dict[str, bool]:
        if isinstance(member, PosteriorMembers):
            return {"folded": False, "channels_last": member.layout == torch.channels_last}
        return {
            "folded": member.config.net is not member.model and not hooked,
            "channels_last": member.config.layout == torch.channels_last,
        }

    def _take(
        self, members: Sequence[InstrumentedModel | PosteriorMembers], ways: dict[str, Any], x: Images
    ) -> None:
        for member, way in zip(members, ways["members"], strict=True):
            if isinstance(member, PosteriorMembers):
                member.layout = FAST[way["channels_last"]]
                continue
            net = (folded(member.model, x[:1]) if way["folded"] else None) or member.model
            member.config = ExecutionConfig(net, None, FAST[way["channels_last"]])
        self._together = stacked(self._meters(), x[:TRIED]) if ways["together"] else None

    def _meters(self) -> list[InstrumentedModel]:
        return [member for member in self._members if isinstance(member, InstrumentedModel)]

    def _faster_together(self, x: Images) -> bool:
        whole = stacked(self._meters(), x[:TRIED])
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
        return seconds[1] < MAX_TIME_SHARE * seconds[0]

    def _forget(self) -> None:
        for member in self._members:
            if isinstance(member, PosteriorMembers):
                member.forget()
            else:
                member.forwards = member.backwards = 0
