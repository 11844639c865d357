"""Surrogates as one ensemble: kept in memory or streamed, each run by its fastest config, passes counted."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from robustkit.attack_api import Surrogates
from robustkit.core.criteria import Goal
from robustkit.core.devices import ComputeDevice
from robustkit.core.isolation import evaluation_mode, threads
from robustkit.core.memory import free_memory
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images
from robustkit.crafting.lazy_models import LazyModel, ModelSlot
from robustkit.crafting.posterior_members import PosteriorMembers
from robustkit.engine.model.batchnorm_folding import folded
from robustkit.engine.model.converted_weights import with_converted_weights
from robustkit.engine.model.instrumented_model import ExecutionConfig, InstrumentedModel
from robustkit.engine.model.loaded_models import Net
from robustkit.engine.model.profiling import MAX_TIME_SHARE
from robustkit.engine.model.stacked_models import StackedModels, stacked
from robustkit.engine.model.tuning import tune

# Images on which stacked nets must return the logits of the single nets.
COMPARED_IMAGES = 8
LAYOUTS = {False: torch.contiguous_format, True: torch.channels_last}


@dataclass(frozen=True)
class Storage:
    """How much of an ensemble is in memory at once.

    `loaded` is whether all nets are, else one at a time; `held` whether the graphs of all nets are, else of one.
    """

    loaded: bool
    held: bool

    @classmethod
    def of(cls, nets: Sequence[Net], batch: int, device: torch.device, streaming: bool | None) -> Storage:
        """Return what fits into half of the free memory, or what `streaming` says if it is not None."""
        if streaming is not None:
            return cls(loaded=not streaming, held=not streaming)
        room = free_memory(device) // 2
        weights = 0 if nets[0].model is not None else sum(net.parameters for net in nets)
        graphs = batch * sum(net.graph for net in nets)
        loaded = all(net.model is not None for net in nets)
        return cls(loaded=loaded, held=loaded and weights + graphs <= room)


@dataclass
class Ensemble:
    """Surrogates on a device, with their passes counted.

    `configs` says how each net is run (see `tune`), as plain values. A resumed run uses the same, since another
    memory layout rounds differently, which can change the sign of a gradient near 0.
    """

    nets: Sequence[Net]
    device: torch.device
    storage: Storage
    combine: str
    weights: Sequence[float] | None = None
    configs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Load the nets unless they are streamed."""
        slot = None if self.storage.loaded else ModelSlot(self.device)
        self._members = [self._member(net, slot) for net in self.nets]
        self._stacked: StackedModels | None = None

    def _member(self, net: Net, slot: ModelSlot | None) -> InstrumentedModel | LazyModel | PosteriorMembers:
        if net.count > 1:
            return PosteriorMembers(net, self.device, slot)
        return net.instrumented(net.load(self.device), self.device) if slot is None else LazyModel(net, slot)

    @property
    def counts(self) -> tuple[int, int]:
        """Forward and backward passes of images through all members so far."""
        counted: list[Any] = [*self._members, *([self._stacked] if self._stacked else [])]
        return sum(one.forwards for one in counted), sum(one.backwards for one in counted)

    @contextmanager
    def in_eval_mode(self) -> Iterator[None]:
        """Put nets into eval mode without parameter gradients, and set the number of CPU threads, inside."""
        with ExitStack() as stack:
            for member in self._members:
                model = member.whole if isinstance(member, PosteriorMembers) else getattr(member, "model", None)
                if model is not None:
                    stack.enter_context(evaluation_mode(model))
            stack.enter_context(threads(max(net.threads for net in self.nets)))
            yield

    def surrogates(self, members: Sequence[int] | None = None) -> Surrogates:
        """Return all surrogates or some, as attacks take them."""
        whole = Surrogates(
            self._members,
            combine=self.combine,
            weights=self.weights,
            hold=self.storage.held,
            together=self._stacked,
        )
        return whole if members is None else whole.select(members)

    def tune(self, x: Images, note: Callable[[str], str], *, hooked: bool) -> None:
        """Choose how to run each net, by trial on x: folded batch norms, memory layout, all nets stacked.

        Args:
            x: a batch of the run (B C H W).
            note: takes the choice as JSON and returns the one to use, made when the run started.
            hooked: whether techniques put hooks on the nets' modules, which folding and stacking would hide.
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
        plain = {"members": [self._config_of(member, hooked) for member in members], "together": False}
        alike = len({net.alike for net in self.nets}) == 1 and self.nets[0].alike is not None
        if alike and not hooked and self.storage.held and len(members) > 1:
            self._set_configs(members, plain, x)
            plain["together"] = self._faster_stacked(x)
        self.apply_configs(json.loads(note(json.dumps(plain))), x)

    def apply_configs(self, configs: dict[str, Any], x: Images) -> None:
        """Run each net by these configs; x are some images to verify stacking on."""
        self.configs = configs
        if configs:
            members = [member for member in self._members if not isinstance(member, LazyModel)]
            self._set_configs(members, configs, x)
            self._reset_counts()

    def _config_of(self, member: InstrumentedModel | PosteriorMembers, hooked: bool) -> dict[str, bool]:
        if isinstance(member, PosteriorMembers):
            return {"folded": False, "channels_last": member.layout == torch.channels_last}
        return {
            "folded": member.config.folded and not hooked,
            "channels_last": member.config.layout == torch.channels_last,
        }

    def _set_configs(
        self, members: Sequence[InstrumentedModel | PosteriorMembers], configs: dict[str, Any], x: Images
    ) -> None:
        for member, config in zip(members, configs["members"], strict=True):
            if isinstance(member, PosteriorMembers):
                member.layout = LAYOUTS[config["channels_last"]]
                continue
            layout, current = LAYOUTS[config["channels_last"]], member.config
            converted = current.original is not None or layout == torch.contiguous_format
            if config["folded"] and current.folded and current.layout == layout and converted:
                continue
            net = (folded(member.model, x[:1]) if config["folded"] else None) or member.model
            # Hooks of techniques are on the nets themselves, so that only a folded net, which has none, is copied.
            copied = with_converted_weights(net, None, layout, math.inf) if net is not member.model else None
            member.config = ExecutionConfig(copied or net, layout=layout, folded=net is not member.model)
        self._stacked = stacked(self._instrumented(), x[:COMPARED_IMAGES]) if configs["together"] else None

    def _instrumented(self) -> list[InstrumentedModel]:
        return [member for member in self._members if isinstance(member, InstrumentedModel)]

    def _faster_stacked(self, x: Images) -> bool:
        whole = stacked(self._instrumented(), x[:COMPARED_IMAGES])
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
                ComputeDevice(x.device).synchronize()
                taken.append(time.perf_counter() - begun)
            seconds.append(min(taken[1:]))
        return seconds[1] < MAX_TIME_SHARE * seconds[0]

    def _reset_counts(self) -> None:
        for member in self._members:
            if isinstance(member, PosteriorMembers):
                member.reset_counts()
            else:
                member.forwards = member.backwards = 0
