"""Posteriors and trained ensembles as members of an ensemble of surrogates: any net on use.

Samples of a posterior share one net, whose weights are replaced; the other weights stay on disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from robustkit.core.isolation import evaluation_mode
from robustkit.core.shapes import Images, Logits
from robustkit.crafting.lazy_models import ModelSlot
from robustkit.engine.model.instrumented_model import ExecutionConfig, InstrumentedModel
from robustkit.engine.model.loaded_models import Net
from robustkit.engine.model.tuning import tune
from robustkit.models.classifier import Classifier
from robustkit.models.ensembles.mixture import Mixture


class PosteriorMembers:
    """A `Population` of `attack_api.posterior_surrogates`: the nets of a mixture, with all their passes counted.

    Without a slot the mixture stays loaded; with one it is loaded there for each call. `layout` is the memory
    layout of the images. Batch norms are never folded, since the weights change.
    """

    def __init__(self, net: Net, device: torch.device, slot: ModelSlot | None = None) -> None:
        """Load the mixture unless a slot is given."""
        self.net, self.device, self.slot = net, device, slot
        self.layout = torch.contiguous_format
        self._forwards = self._backwards = 0
        self.whole = net.load(device) if slot is None else None
        # The instrumented model of each net, by `id`.
        self._instrumented: dict[int, InstrumentedModel] = {}

    def __len__(self) -> int:
        """Return how many nets there are."""
        return self.net.count

    def __call__(self, x: Images) -> Logits:
        """Return the logits of all nets together."""
        with self._loaded() as whole:
            self._forwards += len(self) * len(x)
            return self.net.instrumented(whole, self.device)(x)

    def sample(self, number: int) -> PosteriorSample:
        """Return one of the nets as a member of its own."""
        return PosteriorSample(self, number)

    def place(self, number: int) -> object:
        """Return an object that is the same for nets that cannot be used at the same time."""
        return self if self.whole is None else mixture_of(self.whole).place(number)

    @contextmanager
    def at(self, number: int) -> Iterator[InstrumentedModel]:
        """Yield one of the nets, loaded."""
        with self._loaded() as whole:
            net = mixture_of(whole).at(number)
            if id(net) not in self._instrumented:
                self._instrumented[id(net)] = self.net.instrumented(whole.with_net(net), self.device)
            instrumented = self._instrumented[id(net)]
            instrumented.config = ExecutionConfig(instrumented.model, layout=self.layout)
            yield instrumented

    def tune_layout(self, x: Images) -> None:
        """Choose the memory layout that is fastest on x."""
        with self.at(0) as instrumented:
            tune(instrumented, x, precision=False)
            self.layout = instrumented.config.layout

    @property
    def forwards(self) -> int:
        """Forward passes so far, one for each image and net."""
        return self._forwards + sum(instrumented.forwards for instrumented in self._instrumented.values())

    @property
    def backwards(self) -> int:
        """Backward passes so far, one for each image and net."""
        return self._backwards + sum(instrumented.backwards for instrumented in self._instrumented.values())

    def reset_counts(self) -> None:
        """Set the counts to 0."""
        self._forwards = self._backwards = 0
        self._instrumented = {}

    @contextmanager
    def _loaded(self) -> Iterator[Classifier]:
        if self.whole is not None:
            yield self.whole
            return
        if self.slot is None:
            raise RuntimeError("neither loaded nor with a slot.")
        whole = self.slot.take(self).model
        try:
            with evaluation_mode(whole):
                yield whole
        finally:
            # References kept here would keep the net in memory when the slot loads another.
            self._forwards, self._backwards = self.forwards, self.backwards
            self._instrumented = {}


class PosteriorSample:
    """One net of `PosteriorMembers`, loaded by `resident`."""

    def __init__(self, members: PosteriorMembers, number: int) -> None:
        """Take the net of this number."""
        self.members, self.number = members, number

    @property
    def place(self) -> object:
        """An object that is the same for nets that cannot be used at the same time."""
        return self.members.place(self.number)

    def __call__(self, x: Images) -> Logits:
        """Return the logits (B K) of images x (B C H W)."""
        with self.resident() as model:
            return model(x)

    @contextmanager
    def resident(self) -> Iterator[InstrumentedModel]:
        """Yield the loaded net."""
        with self.members.at(self.number) as instrumented:
            yield instrumented


def mixture_of(classifier: Classifier) -> Mixture:
    """Return the nets of a classifier that consists of several."""
    if not isinstance(classifier.net, Mixture):
        raise RuntimeError(f"{classifier.string} is one net.")
    return classifier.net
